# preload.sh ROOT IMAGES: puts image archives into the store of the containerd that ROOT has, not unpacked, as kind does it.
# Runs in a mount namespace of its own.
set -e
root=$1
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir "$root/tmp/images"
mount --bind "$2" "$root/tmp/images"
chroot "$root" /usr/local/bin/containerd --log-level warn &
containerd=$!
trap 'kill $containerd; wait $containerd' EXIT
tries=0
until chroot "$root" ctr version >/dev/null 2>&1; do
  tries=$((tries + 1))
  [ $tries -lt 100 ]
  sleep 0.1
done
for image in "$root"/tmp/images/*.tar; do
  chroot "$root" ctr --namespace=k8s.io images import --label=io.cri-containerd.pinned=pinned --all-platforms --no-unpack \
    --digests "/tmp/images/$(basename "$image")" >/dev/null
done
