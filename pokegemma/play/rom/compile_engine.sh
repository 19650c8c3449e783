#!/usr/bin/env bash
# compile_engine.sh [OUTPUT]: compile the engine of the toy game's ROM (apt-get install gcc-arm-none-eabi, 12.2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
output=${1:-engine.bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
arm-none-eabi-gcc -mcpu=arm7tdmi -mthumb -mthumb-interwork -Os -std=c11 -Wall -Wextra -Werror -ffreestanding \
    -fno-tree-loop-distribute-patterns -fno-jump-tables -nostdlib -Wl,--build-id=none -Wl,-T,engine.ld start.s engine.c -o "$work/engine.elf"
arm-none-eabi-objcopy -O binary -j .text -j .iwram "$work/engine.elf" "$work/engine.bin"
cp "$work/engine.bin" "$output"
