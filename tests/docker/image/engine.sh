#!/usr/bin/env bash
# A real Docker engine where there is none and no registry can be reached. Debian or Ubuntu, as root.
#
#   engine.sh start FOLDER [PATH...]   prepare an engine and a base image in FOLDER, and start the engine;
#                                      then FOLDER/docker is the command `docker`. It sees the PATHs where they are here
#   engine.sh stop FOLDER              end that engine and delete FOLDER
#
# The engine is Debian's docker.io with BuildKit and compose, in a root folder of its own; its daemon runs in a mount
# namespace of its own and sets neither firewall rules nor IP forwarding, so containers have no way out, but their
# published ports can be reached from here.
#
# The base image has the official one's name and layout, not its bytes: Debian bookworm with this machine's CPython 3.11
# under /usr/local. PYTHON=... names another interpreter than the first `python3` in PATH.
set -euo pipefail

BASE_IMAGE=python:3.11-slim-bookworm
# What the official image keeps of the libraries that CPython was linked with, and of everyday files.
BASE_PACKAGES=ca-certificates,netbase,tzdata,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libnsl2,libreadline8
BASE_PACKAGES+=,libsqlite3-0,libssl3,libtirpc3,libuuid1,zlib1g
ENGINE_PACKAGES="docker.io docker-cli docker-buildx docker-compose iptables"

fail() { echo "engine.sh: $*" >&2; exit 1; }

make_engine() { # FOLDER
  debootstrap --variant=minbase --include=ca-certificates trixie "$1/engine"
  cp /etc/resolv.conf "$1/engine/etc/"
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive chroot "$1/engine" sh -c \
    "apt-get update -q && apt-get install -y -q --no-install-recommends $ENGINE_PACKAGES && apt-get clean"
}

make_base() { # FOLDER
  local root=$1/base python=${PYTHON:-python3} prefix
  prefix=$(env -u PYTHONHOME "$python" -c 'import sys; print(sys.base_prefix if sys.version_info[:2] == (3, 11) else "")')
  [ -n "$prefix" ] || fail "the base image needs CPython 3.11, and $python is another: name one with PYTHON=..."
  debootstrap --variant=minbase --include="$BASE_PACKAGES" bookworm "$root"
  local shared
  shared=$(cd "$prefix" && find lib -maxdepth 1 -name 'libpython3*')
  # shellcheck disable=SC2086
  tar -C "$prefix" --exclude=site-packages --exclude=test --exclude=__pycache__ --exclude='*.a' -cf - \
    bin/python3.11 bin/python3 bin/python lib/python3.11 include $shared | tar -C "$root/usr/local" -xf -
  mkdir -p "$root/usr/local/lib/python3.11/site-packages"
  chroot "$root" sh -c "ldconfig && python3 -m ensurepip && ln -sf pip3 /usr/local/bin/pip &&
    python3 -c 'import bz2, ctypes, lzma, readline, sqlite3, ssl'"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
}

# What the daemon's own mount namespace looks like: the engine's root, and in it the PATHs.
enter() { # ROOT COMMAND... ; PATHS one a line
  local root=$1 path
  shift
  mount --make-rprivate /
  mount --bind "$root" "$root"
  mkdir -p "$root/mnt/old"
  while read -r path; do
    [ -n "$path" ] || continue
    if [ -d "$path" ]; then mkdir -p "$root$path"; else mkdir -p "$(dirname "$root$path")" && touch "$root$path"; fi
    mount --bind "$path" "$root$path"
  done <<<"$PATHS"
  for path in dev sys proc; do mount --rbind /$path "$root/$path"; done
  cd "$root"
  pivot_root . mnt/old
  umount -l /mnt/old
  exec "$@"
}

start() { # FOLDER [PATH...]
  local folder path client
  [ "$(id -u)" = 0 ] || fail "an engine must be started as root"
  folder=$(realpath -m "$1")
  [ ! -e "$folder/pid" ] || fail "an engine was started in $folder already: stop it first"
  mkdir -p "$folder"
  shift
  PATHS=
  for path in "$@"; do PATHS+=$(realpath "$path")$'\n'; done

  command -v debootstrap >/dev/null || { apt-get update -q && apt-get install -y -q debootstrap; } >"$folder/debootstrap.log"
  make_engine "$folder" >"$folder/engine.log" 2>&1 &
  local engine=$!
  make_base "$folder" >"$folder/base.log" 2>&1 || { wait $engine; tail -5 "$folder/base.log" >&2; fail "no base image"; }
  wait $engine || { tail -5 "$folder/engine.log" >&2; fail "no engine"; }

  PATHS=$PATHS setsid unshare --mount "$0" enter "$folder/engine" \
    dockerd --host unix:///run/ci.sock --data-root /var/lib/docker --exec-root /run/ci --pidfile /run/ci.pid \
    --iptables=false --ip6tables=false --ip-forward=false --bridge=none --storage-driver overlay2 \
    >"$folder/dockerd.log" 2>&1 </dev/null &
  echo $! >"$folder/pid"
  client="nsenter --target $(cat "$folder/pid") --mount -- env PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root"
  printf '#!/bin/sh\nexec %s DOCKER_HOST=unix:///run/ci.sock docker "$@"\n' "$client" >"$folder/docker"
  chmod +x "$folder/docker"
  for _ in $(seq 60); do ! "$folder/docker" version >/dev/null 2>&1 || break; sleep 0.5; done
  "$folder/docker" version --format 'Docker {{.Server.Version}}' ||
    { tail -5 "$folder/dockerd.log" >&2; fail "the engine didn't start"; }
  tar -C "$folder/base" -c . | "$folder/docker" import --change 'ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' - "$BASE_IMAGE" >/dev/null
  rm -rf "$folder/base"
}

stop() { # FOLDER
  local pid groups
  if [ -e "$1/pid" ]; then
    pid=$(cat "$1/pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 60); do kill -0 "$pid" 2>/dev/null || break; sleep 0.5; done
    ! kill -0 "$pid" 2>/dev/null || fail "the engine, process $pid, doesn't end: $1 is left as it is"
  fi
  for groups in /sys/fs/cgroup/docker /sys/fs/cgroup/*/docker; do
    [ ! -d "$groups" ] || find "$groups" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -rf --one-file-system "$1"
}

case ${1:-} in
  start | stop) [ $# -ge 2 ] || fail "FOLDER is missing"; "$@" ;;
  enter) shift; enter "$@" ;;
  *) fail "say start FOLDER [PATH...] or stop FOLDER" ;;
esac
