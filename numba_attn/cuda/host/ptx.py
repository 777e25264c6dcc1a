"""PTX as text: the name of its kernel, an older version of it, and its assembly by nvJitLink."""

from __future__ import annotations

import importlib
import re


def older_version(ptx: str, log: str) -> str | None:
    """The PTX with the newest version that an assembler says it knows, if it refused the version. That version is the
    compiler's, not what the code needs: our kernels need PTX 7.8. The pins of another package may leave the compiler
    newer than the assembler."""
    said = re.search(r"Unsupported \.version [\d.]+; current version is '(\d+\.\d+)'", log)
    if said is None:
        return None
    older, count = re.subn(r"^\.version [\d.]+$", f".version {said[1]}", ptx, count=1, flags=re.MULTILINE)
    return older if count and older != ptx else None


def kernel_name(ptx: str, name: str | None = None) -> str:
    """`name`, or that of the only kernel in the PTX."""
    names: list[str] = re.findall(r"\.entry\s+([\w$]+)\s*\(", ptx)
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        told = "name the one to load" if name is None else f"none is called {name}"
        raise ValueError(f"the PTX has {len(names)} kernels; {told}: {', '.join(names)}")
    return name


def assemble(ptx: str, cc: tuple[int, int]) -> tuple[bytes | None, str]:
    """(cubin, "") by nvJitLink, or (None, why not)."""
    try:
        link = importlib.import_module("cuda.bindings.nvjitlink")
        link.version()  # the library itself is loaded by the first call
    except Exception as error:
        return None, f"nvJitLink: {error}"
    try:
        handle = link.create(1, [f"-arch=sm_{cc[0]}{cc[1]}"])
    except link.nvJitLinkError as error:  # a device newer than the library
        return None, f"nvJitLink: {error}"
    try:
        text = ptx.encode()
        link.add_data(handle, int(link.InputType.PTX), text, len(text), "kernel.ptx")
        link.complete(handle)
        cubin = bytearray(link.get_linked_cubin_size(handle))
        link.get_linked_cubin(handle, cubin)
        return bytes(cubin), ""
    except link.nvJitLinkError as error:
        error_text = str(error)
        log = bytearray(link.get_error_log_size(handle))
        if log:
            link.get_error_log(handle, log)
        said = log.split(bytes(1))[0].decode(errors="replace")
    finally:
        link.destroy(handle)
    if (older := older_version(ptx, said)) is not None:
        return assemble(older, cc)
    return None, f"nvJitLink: {error_text}\n{said}".strip()
