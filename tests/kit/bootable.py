"""A disk that boots: a boot sector which says something on the serial console. No kernel, a tenth of a second."""

from __future__ import annotations

_PROGRAM = bytes.fromhex(
    "fc31c08ed8"  # cld; xor ax, ax; mov ds, ax
    "be207c"  # mov si, 7c20h: the text
    "baf803"  # mov dx, 3f8h: COM1
    "ac84c07403"  # next: lodsb; test al, al; jz done
    "eeebf8"  # out dx, al; jmp next
)
_STAYS = bytes.fromhex("f4ebfd")  # done: hlt; jmp done
_RESETS = bytes.fromhex("b0fee664f4ebfd")  # done: mov al, feh; out 64h, al: the keyboard controller resets the machine


def boot_sector(says: str, *, resets: bool = False) -> bytes:
    """512 bytes that say a text on COM1, and then stay, or reset the machine."""
    code = (_PROGRAM + (_RESETS if resets else _STAYS)).ljust(0x20, b"\0")
    return (code + says.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"
