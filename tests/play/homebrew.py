"""One small game as a ROM for the Game Boy Advance and for the Game Boy, assembled here without a toolchain.

The picture shows three numbers: the last button (9 before the first), how far the player is in a tile, and the tiles
walked. A direction other than the last button first turns the player, for 8 frames; held longer, it walks. A tile takes
16 frames. The other buttons only become the last button.
"""

from pathlib import Path

from PIL import Image

BUTTON_NUMBERS = {"a": 1, "b": 2, "select": 3, "start": 4, "right": 5, "left": 6, "up": 7, "down": 8, None: 9}

# r0 and r1 are the addresses of the registers and of the palette; r4 tiles, r5 frames left in this tile, r6 last
# button, r7 frames until it walks. The backdrop's colour is the picture: 5 bits of red are r4, of green r5, of blue r6.
_GBA_PROGRAM = (
    *(0xE3A00301, 0xE3A01405, 0xE3A04000, 0xE3A05000, 0xE3A06009, 0xE3A07000),  # mov r0, #0x04000000 ... mov r7, #0
    0xE1C040B0,  # strh r4, [r0]: mode 0 without backgrounds
    *(0xE1D020B6, 0xE35200A0, 0x2AFFFFFC),  # loop: ldrh r2, [r0, #6]; cmp r2, #160; bcs loop
    *(0xE1D020B6, 0xE35200A0, 0x3AFFFFFC),  # vblank: ldrh r2, [r0, #6]; cmp r2, #160; bcc vblank
    *(0xE2803E13, 0xE1D320B0, 0xE1E02002),  # add r3, r0, #0x130; ldrh r2, [r3]; mvn r2, r2
    *(0xE21220FF, 0x03A07000, 0x0A00000E),  # ands r2, r2, #0xff; moveq r7, #0; beq move
    0xE3A03000,  # mov r3, #0
    *(0xE2833001, 0xE1B020A2, 0x3AFFFFFC),  # bit: add r3, r3, #1; movs r2, r2, lsr #1; bcc bit
    *(0xE1530006, 0x11A06003, 0x13A07008, 0x1A000006),  # cmp r3, r6; movne r6, r3; movne r7, #8; bne move
    *(0xE3530005, 0x3A000004),  # cmp r3, #5; bcc move
    *(0xE3570000, 0x12477001, 0x1A000001),  # cmp r7, #0; subne r7, r7, #1; bne move
    *(0xE3550000, 0x03A05010),  # cmp r5, #0; moveq r5, #16
    *(0xE3550000, 0x0A000001, 0xE2555001, 0x02844001),  # move: cmp r5, #0; beq draw; subs r5, #1; addeq r4, #1
    *(0xE204201F, 0xE1822285, 0xE1822506),  # draw: and r2, r4, #31; orr r2, r5, lsl #5; orr r2, r6, lsl #10
    *(0xE1C120B0, 0xEAFFFFDB),  # strh r2, [r1]; b loop
)

# b tiles, c frames left in this tile, d last button, e frames until it walks. The whole screen is tile 0, whose first
# three rows are d, c and b.
_GB_PROGRAM = """
    f3  wait: f0 44  fe 90  38 wait          di; until vertical blank
    af  e0 40                                LCD off
    21 00 98  map: af 22 7c fe 9c  20 map    clear the map
    21 00 80  tile: af 22 7d fe 10  20 tile  clear tile 0
    af e0 42 e0 43  3e e4 e0 47              SCX, SCY, BGP
    3e 80 e0 68  3e ff e0 69 3e 7f e0 69     palette of the Game Boy Color: white,
    3e 1f e0 69 3e 00 e0 69                  red
    06 00 0e 00 16 09 1e 00                  b, c, d, e
    3e 91 e0 40                              LCD on
    loop: f0 44 fe 90  30 loop
    blank: f0 44 fe 90  38 blank
    3e 20 e0 00 f0 00 f0 00 f0 00 2f e6 0f cb 37 67       directions
    3e 10 e0 00 f0 00 f0 00 f0 00 2f e6 0f b4 67          buttons
    3e 30 e0 00  7c a7  20 pressed  1e 00  18 move
    pressed: 2e 00
    bit: 2c cb 3f  30 bit  7d ba  28 same  57 1e 08  18 move
    same: fe 05  38 move  7b a7  28 walk  1d  18 move
    walk: 79 a7  20 move  0e 10
    move: 79 a7  28 draw  0d  20 draw  04
    draw: 21 00 80 72 2e 02 71 2e 04 70  18 loop
"""


def build_gba_rom() -> bytes:
    """Return the ROM for the Game Boy Advance: a header with nothing but the branch to the code and its fixed byte."""
    header = bytearray(0xC0)
    header[0:4] = (0xEA00002E).to_bytes(4, "little")  # b 0xC0
    header[0xB2] = 0x96
    return bytes(header) + b"".join(word.to_bytes(4, "little") for word in _GBA_PROGRAM)


def build_gb_rom(*, for_colour: bool = False) -> bytes:
    """Return the ROM for the Game Boy, 32 kB as the smallest cartridge, of which the code is 0.2 kB."""
    rom = bytearray(0x8000)
    rom[0x100:0x104] = bytes.fromhex("00 c3 50 01")  # nop; jp 0x150
    rom[0x134:0x13C] = b"HOMEBREW"
    rom[0x143] = 0x80 if for_colour else 0
    rom[0x14D] = -sum(byte + 1 for byte in rom[0x134:0x14D]) % 256
    code = _assemble(_GB_PROGRAM)
    rom[0x150 : 0x150 + len(code)] = code
    return bytes(rom)


def _assemble(program: str) -> bytes:
    """Return the bytes of hexadecimal numbers; "name:" is a label and "name" the distance to it, of a relative jump."""
    code: list[int | str] = []
    labels: dict[str, int] = {}
    for line in program.splitlines():
        for word in line.split():
            if word.endswith(":"):
                labels[word[:-1]] = len(code)
            elif len(word) == 2 and set(word) <= set("0123456789abcdef"):
                code.append(int(word, 16))
            elif code and code[-1] in (0x18, 0x20, 0x28, 0x30, 0x38):
                code.append(word)
            else:
                break  # a comment
    return bytes(labels[item] - at - 1 & 0xFF if isinstance(item, str) else item for at, item in enumerate(code))


def write_roms(folder: Path) -> dict[str, Path]:
    """Write game.gba, game.gb and game.gbc; return their paths by system."""
    roms = {"GBA": build_gba_rom(), "GB": build_gb_rom(), "GBC": build_gb_rom(for_colour=True)}
    for system, rom in roms.items():
        (folder / f"game.{system.lower()}").write_bytes(rom)
    return {system: folder / f"game.{system.lower()}" for system in roms}


def read_screen(screen: Image.Image) -> tuple[int, int, int]:
    """Return (number of the last button, frames left in this tile, tiles walked) as the picture shows them."""
    if screen.size == (240, 160):
        red, green, blue = screen.getpixel((120, 80))
        return blue >> 3, green >> 3, red >> 3
    background = screen.getpixel((0, 3))
    rows = [[screen.getpixel((x, y)) != background for x in range(8)] for y in range(3)]
    last, left, walked = (int("".join("01"[pixel] for pixel in row), 2) for row in rows)
    return last, left, walked
