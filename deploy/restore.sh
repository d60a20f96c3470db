#!/usr/bin/env bash
# A backup put in place for gateways that are stopped: deploy/restore.sh BACKUP_DIR DATA_DIR
# DATA_DIR is new. With OVI_DATABASE_URL its database is there and empty, and pg_restore fills it.
set -euo pipefail
backup=$1 data=$2

umask 077
[ ! -e "$data" ] || [ -z "$(ls -A "$data")" ] || { echo "$data is not empty; choose another folder" >&2 && exit 1; }
mkdir -p "$data"
if [ -n "${OVI_DATABASE_URL:-}" ]; then
    pg_restore --exit-on-error --no-owner --dbname="${OVI_DATABASE_URL/postgresql+psycopg:/postgresql:}" "$backup/ovi.dump"
else
    cp -a "$backup/ovi.sqlite3" "$data/"
fi
for folder in artifacts images; do
    [ ! -d "$backup/$folder" ] || cp -a "$backup/$folder" "$data/"
done
