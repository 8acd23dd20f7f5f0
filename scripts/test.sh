#!/usr/bin/env bash
# Runs every test: on the CPU, and the kernels on wgpu, with and without Burn's fusion. Where the machine has no Vulkan
# device, Mesa's software one is installed first.
#
#   scripts/test.sh                       everything
#   scripts/test.sh --test ops -- gla     any arguments of `cargo test`: those alone, once
set -euo pipefail
cd "$(dirname "$0")/.."

# A driver that the Vulkan loader would find. Drivers for hardware that is not there answer with no device, so only
# vulkaninfo's word counts for those; Mesa's lavapipe runs on any processor.
has_vulkan() {
    compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null && return 0
    compgen -G '/usr/local/share/vulkan/icd.d/lvp_icd*.json' >/dev/null && return 0
    compgen -G '/etc/vulkan/icd.d/lvp_icd*.json' >/dev/null && return 0
    [ -e "${VK_ICD_FILENAMES:-${VK_DRIVER_FILES:-}}" ] && return 0
    command -v vulkaninfo >/dev/null && vulkaninfo --summary 2>/dev/null | grep -q deviceName
}

install_vulkan() {
    echo "No Vulkan device here: installing Mesa's software Vulkan (package mesa-vulkan-drivers)."
    local root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || return 1
        root=(sudo)
    fi
    command -v apt-get >/dev/null || return 1
    "${root[@]}" apt-get update -qq &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers
}

if [ "$(uname -s)" = Linux ] && ! has_vulkan && ! install_vulkan; then
    cat >&2 <<'TEXT'
error: the kernel tests need a Vulkan device, and Mesa's software one could not be installed by apt-get.
Install it with the system's own tool, then run this again:
  Fedora   dnf install mesa-vulkan-drivers vulkan-loader
  Arch     pacman -S vulkan-swrast vulkan-icd-loader
  Alpine   apk add mesa-vulkan-swrast vulkan-loader
TEXT
    exit 1
fi

# The loader complains on every device it opens where this is unset, as in a container.
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

if [ $# -gt 0 ]; then
    exec cargo test --release --workspace "$@"
fi

cargo test --release --workspace
echo "Once more what touches kernels, with Burn's fusion off:"
BURN_FUSION_MAX_EXPLORATIONS=0 cargo test --release --workspace --test ops --test support
BURN_FUSION_MAX_EXPLORATIONS=0 cargo test --release --workspace --test nn -- with_kernels kernels_give
