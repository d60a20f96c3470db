#!/usr/bin/env bash
# Passwords for compose.yaml: .env, and deploy/secrets/ for what services read from files. Keeps what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

umask 077
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

touch .env
for name in POSTGRES_PASSWORD GRAFANA_PASSWORD; do
    grep -q "^$name=" .env || echo "$name=$(random)" >>.env
done
mkdir -p deploy/secrets
# The folder is closed to others; the file is open, since the container's user is not the one who wrote it.
[ -e deploy/secrets/admin_key ] || { random >deploy/secrets/admin_key && chmod 0444 deploy/secrets/admin_key; }
echo "Passwords are in .env, the administrator's key in deploy/secrets/admin_key."
