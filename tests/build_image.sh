#!/usr/bin/env bash
# Builds the Dockerfile without an engine, on a small stand-in for its base, and runs what came out.
#
#   bash tests/build_image.sh FOLDER     root on Debian; about 4 minutes and 2 GB; keeps FOLDER/rootfs
#
# The stand-in is Debian's Python and compiler, which see the packages of .venv, torch among them:
# it shows that the Dockerfile builds and that the image works without its entry point, not that the
# packages of NVIDIA's images fit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(realpath -m "$1")
venv=$(realpath "${MEGATRON_IDEA_VENV:-.venv}")
site=$(ls -d "$venv"/lib/python3.*/site-packages)
mkdir -p "$folder"
build() { buildah --root "$folder/store" --runroot "$folder/run" --storage-driver vfs "$@"; }

for program in buildah debootstrap; do
    command -v "$program" >/dev/null || apt-get install -qq -y --no-install-recommends "$program"
done
if [[ ! -e $folder/rootfs/usr/bin/g++ ]]; then
    debootstrap --variant=minbase --include=python3,python3-pip,python3-dev,g++,ca-certificates \
        "$(sed -n "s/^VERSION_CODENAME=//p" /etc/os-release)" "$folder/rootfs" >"$folder/debootstrap.log"
fi

# All packages but the one that the image is to install, and none of those that would be upgraded.
rm -rf "$folder/site" && mkdir "$folder/site"
for path in "$site"/*; do
    case ${path##*/} in
        *megatron_idea* | pip | pip-* | *.pth) ;;
        *) ln -s "$path" "$folder/site/" ;;
    esac
done
base=$(build from scratch)
build add --quiet "$base" "$folder/rootfs" / >/dev/null
build run --isolation chroot "$base" -- \
    sh -c 'echo /base-site >/usr/lib/python3/dist-packages/base.pth'
build commit --quiet --rm "$base" localhost/stand-in >/dev/null

mounts=(--volume "$folder/site:/base-site:ro" --volume "$venv:$venv:ro")
# How this host reaches its packages.
for path in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /opt/wheels; do
    if [[ -e $path ]]; then mounts+=(--volume "$path:$path:ro"); fi
done
user_conf=${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf
if [[ -e $user_conf ]]; then mounts+=(--volume "$user_conf:/root/.config/pip/pip.conf:ro"); fi

build bud --isolation chroot --pull-never --build-arg BASE=localhost/stand-in \
    --tag localhost/megatron-idea "${mounts[@]}" .

# As a container plugin does: a command instead of the entry point, another user, another folder.
image=$(build from --pull-never localhost/megatron-idea)
build run --isolation chroot --user 12345 --workingdir /tmp "${mounts[@]}" "$image" -- \
    megatron-idea plan /opt/megatron_idea/examples/configs/quickstart.yaml
build rm "$image" >/dev/null
echo "the image was built and runs"
