#!/usr/bin/env bash
# A one-node Ceph RGW on loopback: a real, strict S3 server for tests and for trying things by hand.
#   infra/s3/rgw.sh install|start|stop|env        RGW_DIR and RGW_PORT choose another place
set -euo pipefail

D=${RGW_DIR:-${TMPDIR:-/tmp}/img2parquet-rgw}
PORT=${RGW_PORT:-7480}
MON_PORT=$((PORT + 1)) # the monitor's two protocols take this port and the next
C=$D/ceph.conf
KEY=AKTEST SECRET=SKTEST12345 # of a throw-away store that only this machine reaches

main() {
  case ${1:-} in
    install) install ;;
    start) start ;;
    stop) stop ;;
    env) print_env ;;
    *) echo "usage: $0 install|start|stop|env" >&2; exit 2 ;;
  esac
}

install() {
  local missing=0
  for tool in radosgw ceph-mon ceph-osd uuidgen curl; do command -v $tool >/dev/null || missing=1; done
  [ $missing = 1 ] || return 0
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    radosgw ceph-mon ceph-osd uuid-runtime curl >/dev/null
}

start() {
  [ "$(id -u)" = 0 ] || { echo "error: the Ceph daemons want root; run this in a container or with sudo" >&2; exit 1; }
  command -v radosgw >/dev/null || { echo "error: radosgw is not installed; run \`$0 install\`" >&2; exit 1; }
  if answers; then print_env; return; fi
  stop
  [ -e "$D/ready" ] || create
  run_daemons >&2
  wait_for_answer
  print_env
}

create() { # a new cluster with one monitor, one disk (a sparse file) and one S3 user
  rm -rf "$D"
  mkdir -p "$D/mon" "$D/osd" "$D/rgw" "$D/log"
  local fsid osd
  fsid=$(uuidgen) osd=$(uuidgen)
  write_conf "$fsid"
  {
    ceph-authtool --create-keyring "$D/admin.keyring" --gen-key -n client.admin \
      --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool --create-keyring "$D/mon.keyring" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$D/mon.keyring" --import-keyring "$D/admin.keyring"
    monmaptool --create --fsid "$fsid" --addv a "$(mon_address)" "$D/monmap"
    ceph-mon --mkfs -i a --monmap "$D/monmap" --keyring "$D/mon.keyring" -c "$C"
    ceph-mon -i a -c "$C" --pid-file "$D/mon.pid"
    timeout 60 ceph -c "$C" osd new "$osd"
    timeout 60 ceph -c "$C" auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' -o "$D/osd/keyring"
    ceph-osd -i 0 -c "$C" --mkfs --osd-uuid "$osd" --no-mon-config
    ceph-osd -i 0 -c "$C" --pid-file "$D/osd.pid"
    timeout 120 radosgw-admin -c "$C" user create --uid=test --display-name=test --access-key=$KEY --secret-key=$SECRET
  } >"$D/log/create.log" 2>&1 || { tail -20 "$D/log/create.log" >&2; stop; exit 1; }
  touch "$D/ready"
}

write_conf() { # without cluster_addr the OSD would listen on every interface; authentication `none` breaks radosgw
  cat >"$C" <<CONF
[global]
fsid = $1
mon_host = $(mon_address)
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = $D/admin.keyring
mon_data = $D/mon
osd_data = $D/osd
rgw_data = $D/rgw
run_dir = $D
admin_socket = $D/\$name.asok
log_file = $D/log/\$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
bluestore_block_size = 10737418240
osd_memory_target = 939524096
auth_allow_insecure_global_id_reclaim = false
[mon]
keyring = $D/mon.keyring
[osd]
keyring = $D/osd/keyring
CONF
}

mon_address() { echo "[v2:127.0.0.1:$MON_PORT,v1:127.0.0.1:$((MON_PORT + 1))]"; }

run_daemons() {
  runs mon || ceph-mon -i a -c "$C" --pid-file "$D/mon.pid"
  runs osd || ceph-osd -i 0 -c "$C" --pid-file "$D/osd.pid"
  radosgw -c "$C" -n client.admin --rgw-frontends="beast endpoint=127.0.0.1:$PORT tcp_nodelay=1" \
    --pid-file "$D/rgw.pid" --log-file "$D/log/rgw.log"
}

wait_for_answer() {
  for _ in $(seq 600); do
    if answers; then return; fi
    sleep 0.1
  done
  echo "error: no answer on 127.0.0.1:$PORT after 60 s; see $D/log" >&2
  exit 1
}

answers() { curl -s -m 2 -o /dev/null "http://127.0.0.1:$PORT/"; }

runs() { # the pid file may be older than the machine's last start: look at what the process is
  local pid
  pid=$(cat "$D/$1.pid" 2>/dev/null) || return 1
  case $(cat "/proc/$pid/comm" 2>/dev/null) in radosgw | ceph-osd | ceph-mon) return 0 ;; *) return 1 ;; esac
}

stop() {
  for daemon in rgw osd mon; do
    runs $daemon || continue
    kill "$(cat "$D/$daemon.pid")"
    for _ in $(seq 300); do runs $daemon || break; sleep 0.1; done # the OSD takes some seconds
    rm -f "$D/$daemon.pid"
  done
}

print_env() {
  cat <<ENV
export AWS_ENDPOINT_URL=http://127.0.0.1:$PORT
export AWS_ACCESS_KEY_ID=$KEY
export AWS_SECRET_ACCESS_KEY=$SECRET
export AWS_DEFAULT_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required
export IMG2PARQUET_REALSTORE=http://127.0.0.1:$PORT
ENV
}

main "$@"
