@ Header and entry of the cartridge; engine.c says what the game is.

    .section .header, "ax"
    .arm
    .global start
    b start
    .space 156                  @ the place of a logo that is not ours to copy; mGBA and SkyEmu accept zeros
    .ascii "POKEGEMMATOY"       @ title
    .ascii "PTOY"               @ game code
    .ascii "00"                 @ maker
    .byte 0x96                  @ fixed by the console
    .space 10                   @ unit, device, reserved, version
    .byte 0x13                  @ complement of the bytes from the title to here
    .space 2

start:
    ldr sp, =0x03007f00
    ldr r0, =iwram_start        @ copy the code that draws to fast memory
    ldr r1, =iwram_end
    ldr r2, =iwram_source
1:  cmp r0, r1
    ldrlo r3, [r2], #4
    strlo r3, [r0], #4
    blo 1b
    ldr r0, =bss_start          @ clear the variables
    ldr r1, =bss_end
    mov r2, #0
2:  cmp r0, r1
    strlo r2, [r0], #4
    blo 2b
    ldr r0, =main
    bx r0
    .pool
