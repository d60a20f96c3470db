#!/usr/bin/env bash
# A consistent copy of jobs, clips and pictures, made while gateways run: deploy/backup.sh DATA_DIR BACKUP_DIR
# With OVI_DATABASE_URL the jobs are in PostgreSQL and pg_dump has to be there; else in a file of DATA_DIR.
set -euo pipefail
data=$1 backup=$2

umask 077
mkdir -p "$backup"
# The database first: of a job that ends meanwhile there are files too many, never too few.
if [ -n "${OVI_DATABASE_URL:-}" ]; then
    pg_dump --format=custom --no-owner --file="$backup/ovi.dump" "${OVI_DATABASE_URL/postgresql+psycopg:/postgresql:}"
else
    python3 - "$data/ovi.sqlite3" "$backup/ovi.sqlite3" <<'END'
import contextlib
import pathlib
import sqlite3
import sys

pathlib.Path(sys.argv[2]).unlink(missing_ok=True)
with contextlib.closing(sqlite3.connect(f"file:{sys.argv[1]}?mode=rw", uri=True)) as database:
    database.execute("VACUUM INTO ?", (sys.argv[2],))
END
fi
for folder in artifacts images; do
    [ ! -d "$data/$folder" ] || cp -a "$data/$folder" "$backup/"
done
