"""A driver for tests: `libnvidia-ml` at its C interface, below NVIDIA's own Python binding, which runs as it is."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

Status = int
OK, NOT_FOUND, NOT_SUPPORTED = 0, 6, 3


@dataclass
class Card:
    """One GPU as the driver describes it. `links`: (card at the other end or None for a switch) of each NVLink."""

    name: str = "NVIDIA H100 NVL"
    memory_mib: int = 95830
    uuid: str = "GPU-aa11"
    links: tuple[int | None, ...] = ()
    ecc_errors: int = 0


@dataclass
class FakeNvml:
    """The functions that anchor calls. `cuda`: the newest CUDA release this driver runs, as NVML counts: 12040."""

    cards: list[Card] = field(default_factory=list)
    driver: str = "580.95.05"
    cuda: int = 13000

    def __getattr__(self, name: str) -> Callable[..., Status]:
        functions: dict[str, Callable[..., Status]] = {
            "nvmlInitWithFlags": lambda flags: OK,
            "nvmlShutdown": lambda: OK,
            "nvmlErrorString": lambda code: b"no such thing",
            "nvmlSystemGetDriverVersion": lambda text, size: _text(text, self.driver),
            "nvmlSystemGetCudaDriverVersion_v2": lambda number: _number(number, self.cuda),
            "nvmlDeviceGetCount_v2": lambda number: _number(number, len(self.cards)),
            "nvmlDeviceGetHandleByIndex_v2": lambda index, handle: _handle(handle, index.value),
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetName": lambda handle, text, size: _text(text, self._card(handle).name),
            "nvmlDeviceGetUUID": lambda handle, text, size: _text(text, self._card(handle).uuid),
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetTotalEccErrors": lambda handle, kind, since, number: _number(
                number, self._card(handle).ecc_errors
            ),
            "nvmlDeviceGetP2PStatus": self._nvlink_status,
            "nvmlDeviceGetPciInfo_v3": lambda handle, info: _number(info, _index(handle), "bus"),
            "nvmlDeviceGetNvLinkState": lambda handle, link, number: (
                _number(number, 1) if link < len(self._card(handle).links) else NOT_SUPPORTED
            ),
            "nvmlDeviceGetNvLinkRemotePciInfo_v2": self._other_end,
            "nvmlDeviceGetTopologyCommonAncestor": lambda one, other, level: _number(level, 50),
        }
        if name not in functions:
            raise AttributeError(name)
        return functions[name]

    def _card(self, handle: Any) -> Card:
        return self.cards[_index(handle)]

    def _by_uuid(self, uuid: Any, handle: Any) -> Status:
        places = [place for place, card in enumerate(self.cards) if card.uuid.encode() == uuid.value]
        return _handle(handle, places[0]) if places else NOT_FOUND

    def _memory(self, handle: Any, info: Any) -> Status:
        return _number(info, self._card(handle).memory_mib << 20, "total")

    def _nvlink_status(self, one: Any, other: Any, kind: int, status: Any) -> Status:
        assert kind == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        ends = self._card(one).links
        connected = _index(other) in ends or None in ends
        return _number(status, pynvml.NVML_P2P_STATUS_OK if connected else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)

    def _other_end(self, handle: Any, link: int, info: Any) -> Status:
        end = self._card(handle).links[link]
        return _number(info, 255 if end is None else end, "bus")


def _number(reference: Any, value: int, name: str = "value") -> Status:
    setattr(reference._obj, name, value)
    return OK


def _text(buffer: Any, value: str) -> Status:
    buffer.value = value.encode()
    return OK


def _handle(reference: Any, index: int) -> Status:
    address = ctypes.c_void_p(index + 1)  # handles are opaque pointers
    ctypes.memmove(reference, ctypes.byref(address), ctypes.sizeof(address))
    return OK


def _index(handle: Any) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0) - 1


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    """Let pynvml find this driver in this test."""
    monkeypatch.setattr(pynvml, "nvmlLib", nvml)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
