"""The colour tables of every picture and view: even in lightness, safe for colour-blind readers, the same everywhere."""

import numpy as np

# Every fifth entry of matplotlib's viridis and cividis (CC0); the entries between follow to within 1/255 and 4/255.
_VIRIDIS = (
    "440154 46085c 471063 481769 481d6f 482475 472a7a 46307e 453781 433d84 414287 3f4889 3d4e8a "
    "3a538b 38598c 355e8d 33638d 31688e 2e6d8e 2c718e 2a768e 297b8e 27808e 25848e 23898e 218e8d "
    "20928c 1f978b 1e9c89 1fa188 21a585 24aa83 28ae80 2eb37c 35b779 3dbc74 46c06f 50c46a 5ac864 "
    "65cb5e 70cf57 7cd250 89d548 95d840 a2da37 b0dd2f bddf26 cae11f d8e219 e5e419 f1e51d fde725 "
)
_CIVIDIS = (
    "00224e 002656 002a5f 002d68 003070 083370 163770 203a6f 273e6e 2e416d 34456c 3a486c 3f4c6c "
    "444f6c 49536c 4e566c 535a6d 575d6d 5c616e 60646f 656870 696b71 6d6f72 727274 767676 7a7a78 "
    "7e7d78 838179 888578 8d8878 928c78 969077 9b9476 a09875 a59c74 aaa073 afa471 b5a86f baac6d "
    "bfb06b c4b468 c9b965 cfbd62 d4c15f dac65b dfca57 e5cf52 ead34c f0d846 f6dd3f fce236 fee838 "
)
_GREY = "141414 f2f2f2"
_BLUE_ORANGE = "0a3a75 2f6fb3 86b3dc f4f3f0 e9a76b c2641c 7a3206"  # less than nothing, nothing, more than nothing

ABOVE = (255, 0, 144)  # beyond the scale's upper end; no colour of a table is like it
BELOW = (0, 214, 245)  # beyond its lower end
NO_VALUE = (160, 160, 160)


def _table(anchors: str) -> np.ndarray:
    """Colours, uint8 (256, 3), that run through the anchors, which are equally far apart."""
    colours = np.frombuffer(bytes.fromhex(anchors), dtype=np.uint8).reshape(-1, 3)
    places = np.linspace(0, 255, len(colours))
    return np.stack([np.interp(np.arange(256), places, channel).round() for channel in colours.T], axis=1).astype(np.uint8)


VIRIDIS = _table(_VIRIDIS)
SEQUENTIAL = {"viridis": VIRIDIS, "cividis": _table(_CIVIDIS), "grey": _table(_GREY)}
DIVERGING = _table(_BLUE_ORANGE)
