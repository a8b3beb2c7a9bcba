#!/bin/sh
# Settings that are the whole machine's, and that a kubelet and systemd want to write: files with the wanted values over them.
set -e
mkdir -p /run/kernel-settings
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  name=${setting%%=*}
  file=/run/kernel-settings/$(echo "$name" | tr / _)
  echo "${setting##*=}" > "$file"
  mount --bind "$file" "/proc/sys/$name"
done
