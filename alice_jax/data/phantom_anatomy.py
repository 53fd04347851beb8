"""The one canonical anatomy that every phantom patient deforms: where each tissue lies.

In the millimetres of `phantom_canvas`, so that the liver lies at x < 0 and the apex of the heart, the spleen and the
stomach at x > 0.
"""

import functools

import numpy as np

from alice_jax.data import splines
from alice_jax.data.phantom_canvas import Canvas, curve
from alice_jax.data.phantom_tissues import VERTEBRAE

# Vertebrae of growing height, and their upper borders above the sacrum.
_HEIGHTS = np.array([15.0, *np.linspace(16, 24, 12), *np.linspace(26, 29, 5)])
_TOPS = 140.0 + np.cumsum(_HEIGHTS[::-1])[::-1]

# fmt: off
# Outlines by height: half width, half depth, centre (y) of the skin, of the cavity inside the muscles, of the lungs.
_Z = [0, 60, 130, 180, 240, 300, 360, 420, 460, 490, 508, 520, 533, 545, 560]
_BODY = ([166, 166, 154, 142, 138, 144, 151, 158, 167, 176, 168, 140, 96, 66, 60],
         [98, 108, 104, 100, 102, 107, 112, 112, 106, 94, 84, 76, 66, 58, 57],
         [5, 5, 4, 5, 6, 7, 7, 7, 7, 9, 12, 14, 14, 13, 12])
_FAT_MM = [20, 22, 20, 17, 14, 12, 10, 9, 9, 9, 9, 9, 7, 5, 5]
_CAVITY_Z = [0, 40, 75, 120, 150, 200, 250, 300, 340, 400, 440, 470, 495, 510, 522, 560]
_CAVITY = ([5, 45, 58, 72, 104, 112, 114, 123, 129, 129, 119, 103, 79, 54, 34, 22],
           [5, 50, 66, 74, 76, 74, 76, 82, 87, 86, 78, 66, 48, 36, 26, 20],
           [0, 0, -4, -6, -8, -8, -4, 2, 4, 5, 6, 8, 10, 11, 12, 2])
_SPINE_Z = [60, 100, 140, 200, 280, 340, 400, 460, 520, 560]
_SPINE_Y = [88, 76, 56, 43, 48, 58, 63, 57, 38, 28]
# fmt: on


def spine_y_mm(z_mm):
    """Centre (y) of the vertebral bodies at height z."""
    return splines.through(_SPINE_Z, _SPINE_Y)(np.clip(z_mm, 60, 560))


@functools.lru_cache(maxsize=1)
def atlas() -> np.ndarray:
    """Tissue codes on the canonical grid (z, y, x) uint8: voxel i lies at LOW_ZYX_MM + i * SPACING_MM.

    Painting takes some seconds, once per process.
    """
    c = Canvas()
    cavity = c.outline(_CAVITY_Z, _CAVITY)
    _trunk(c, cavity)
    _bones(c)
    _chest(c, cavity)
    _abdomen(c, cavity)
    _pelvis(c)
    c.tissue.setflags(write=False)
    return c.tissue


def _trunk(c: Canvas, cavity: np.ndarray) -> None:
    """Skin, fat, muscles, the cavity; arms, which a patient may leave out."""
    everything = (slice(None),) * 3
    c.tube(
        [(200, 30, 196), (330, 35, 192), (480, 20, 172)],
        [30, 36, 36],
        (0, "arm_fat"),
        (-6, "arm_muscle"),
        both_sides=True,
    )
    c.tube([(200, 30, 196), (330, 35, 192), (480, 20, 172)], 10, (0, "arm_bone"), (-4, "arm_muscle"), both_sides=True)
    skin = c.outline(_Z, _BODY)
    fat = np.interp(c.axes[0], _Z, _FAT_MM).astype(np.float32)[:, None, None]
    c.fill(everything, skin < 0, "skin")
    c.fill(everything, skin < -2.4, "fat")
    c.fill(everything, skin < -fat, "muscle")
    # Streaks of fat between the layers of muscle.
    c.fill(everything, (np.abs(cavity - 8 + 0.02 * c.zyx[0]) < 1.2) & (skin < -fat), "muscle_fat")
    c.fill(everything, cavity < 3, "muscle")
    c.fill(everything, cavity < 0, "visceral_fat")
    levels = np.arange(40, 545, 12.0)
    c.tube(
        np.stack([levels, np.minimum(spine_y_mm(levels) + 34, 92), np.full(len(levels), 31.0)], 1),
        np.interp(levels, [40, 140, 260, 400, 545], [14, 20, 22, 15, 13]),
        (0, "muscle"),
        both_sides=True,
    )
    c.tube(
        [(275, 52, 30), (210, 42, 42), (160, 28, 48), (100, -20, 62), (50, -20, 85)],
        [9, 15, 20, 15, 13],
        (0, "muscle"),
        both_sides=True,
    )
    c.tube([(480, -74, 45), (455, -80, 80), (470, -40, 135)], [9, 12, 10], (0, "muscle"), both_sides=True)


def _vertebra(c: Canvas, index: int) -> None:
    """Body with cortex, arch around the canal, spinous and transverse processes of one vertebra."""
    name, height = VERTEBRAE[index], _HEIGHTS[index]
    z0 = _TOPS[index] - height / 2
    y0, half_width = float(spine_y_mm(z0)), np.interp(z0, [140, 290, 420, 520, 535], [25, 21, 16, 14.5, 13])
    half_depth, half_height = half_width * 0.72, height / 2 - 2.6
    canal_y = y0 + half_depth + 8

    def body(z, y, x):
        waist = 1 - 0.12 * np.cos(np.clip((z - z0) / half_height, -1, 1) * np.pi / 2)
        radial = (np.sqrt(((y - y0) / half_depth) ** 2 + (x / half_width) ** 2) / waist - 1) * half_depth
        return np.maximum(radial, np.abs(z - z0) - half_height)

    def disc(z, y, x):
        radial = (np.sqrt(((y - y0) / half_depth) ** 2 + (x / half_width) ** 2) - 0.96) * half_depth
        return np.maximum(radial, np.abs(z - z0) - height / 2)

    def arch(z, y, x):
        ring = np.abs(np.sqrt((y - canal_y) ** 2 + x * x) - 11.0) - 3.4
        return np.maximum(ring, np.abs(z - z0) - 0.36 * height)

    around = ((z0 - height / 2, y0 - 25, -30), (z0 + height / 2, canal_y + 18, 30))
    c.shape(*around, disc, (0, "disc"))
    side = 30 if name.startswith("L") else 26
    c.tube([(z0, canal_y - 4, 9), (z0 + 1, canal_y + 2, side)], [4.5, 3.2], (0, name), both_sides=True)
    c.tube([(z0 - 1, canal_y + 11, 0), (z0 - 0.45 * height, canal_y + 26, 0)], [4.5, 3.6], (0, name))
    c.shape(*around, arch, (0, name))
    c.shape(*around, body, (0, name), (-2.2, f"{name}_marrow"))


def _bones(c: Canvas) -> None:
    for index in range(len(VERTEBRAE)):
        _vertebra(c, index)
    levels = np.arange(85, 560, 10.0)
    half_depth = 0.72 * np.interp(levels, [140, 290, 420, 520, 535], [25, 21, 16, 14.5, 13])
    c.tube(np.stack([levels, spine_y_mm(levels) + half_depth + 8, 0 * levels], 1), 7.5, (0, "cord"))
    for number in range(1, 13):
        _rib(c, number)
    for x in (-7.0, 0.0, 7.0):
        c.tube([(372, -88, x), (430, -83, x), (478, -67, x)], [5, 6, 7], (0, "sternum"), (-2.5, "sternum_marrow"))
    c.tube(
        [(484, -66, 16), (498, -55, 60), (506, -20, 105), (500, 0, 140)],
        6,
        (0, "shoulder"),
        (-2.5, "shoulder_marrow"),
        both_sides=True,
    )
    glenoid = np.array((488.0, 35.0, 126.0))
    for t in np.linspace(0, 1, 12):
        medial = (1 - t) * np.array((492.0, 74.0, 66.0)) + t * np.array((395.0, 90.0, 88.0))
        c.tube([glenoid, medial], [5, 2.6], (0, "shoulder"), both_sides=True)
    c.tube([(486, 18, 150), (488, 18, 152)], 20, (0, "shoulder"), (-2.5, "shoulder_marrow"), both_sides=True)


def _rib(c: Canvas, number: int) -> None:
    """One pair of ribs: around the cavity and downward to the front; from ten of them cartilage to the sternum."""
    index = VERTEBRAE.index(f"T{number}")
    z0 = _TOPS[index] - 5
    end = np.interp(number, [1, 2, 7, 10, 11, 12], [150, 145, 138, 120, 88, 62])
    angles = np.deg2rad(np.linspace(16, end, 12))
    z = z0 - np.interp(number, [1, 5, 8, 12], [28, 62, 78, 50]) * (1 - np.cos(angles)) / 2
    width, depth, centre = (np.interp(z, _CAVITY_Z, t) for t in _CAVITY)
    y, x = centre + (depth + 6) * np.cos(angles), (width + 6) * np.sin(angles)
    points = np.stack([z, y, x], 1)
    root = (z0, spine_y_mm(z0) + 10, 17.0)
    c.tube(np.concatenate([[root], points]), 5.4, (0, "rib"), (-2.4, "rib_marrow"), both_sides=True)
    if number <= 10:
        sternal = (np.interp(number, [1, 7, 10], [474, 380, 374]), np.interp(number, [1, 7, 10], [-66, -84, -84]), 12.0)
        middle = (points[-1] + sternal) / 2 + (0 if number < 6 else -14, -7, 0)
        c.tube(
            [points[-1], middle, sternal],
            5,
            (0, "cartilage"),
            both_sides=True,
            only=("muscle", "muscle_fat", "fat", "visceral_fat"),
        )


def _diaphragm_z_mm(y, x):
    """Height of the two domes of the diaphragm; the right one, over the liver, is higher."""
    steep = np.where(y > -5, 0.0105, 0.0065)
    right = 380 - 0.0075 * (x + 66) ** 2 - steep * (y + 5) ** 2
    left = 364 - 0.0075 * (x - 68) ** 2 - steep * (y + 5) ** 2
    return np.maximum(right, left)


def _chest(c: Canvas, cavity: np.ndarray) -> None:
    whole = ((270, -100, -140), (522, 105, 140))
    window = c.window(*whole)
    within = cavity[window]
    z, y, x = c.zyx[(slice(None), *window)]
    middle = np.interp(z[:, 0, 0], [330, 400, 450, 500, 525], [30, 25, 25, 27, 30]).astype(np.float32)[:, None, None]
    middle = middle * np.clip((y + 72) / 45, 0.2, 1)
    lungs = (within < -1) & (z > _diaphragm_z_mm(y, x)) & (z < 516)
    for name, inside in (("lung_right", lungs & (x < -middle)), ("lung_left", lungs & (x > middle))):
        c.fill(window, inside, name, only=("visceral_fat",))
    # Heart: apex to the left, front and below.
    c.ellipsoid((392, -25, 22), (58, 44, 50), (5, "visceral_fat"), (0, "heart"), tilt_zx=-32, tilt_zy=14)
    c.ellipsoid((381, -16, 40), (36, 20, 20), (0, "heart_left"), tilt_zx=-38, tilt_zy=10)
    c.ellipsoid((385, -48, 12), (36, 13, 26), (0, "heart_right"), tilt_zx=-38)
    c.ellipsoid((414, 2, 16), (19, 17, 27), (0, "heart_left"))
    c.ellipsoid((402, -20, -20), (28, 22, 18), (0, "heart_right"))
    c.tube([(408, -34, 14), (432, -36, 18), (448, -16, 18)], 13, (0, "pulmonary_artery"))
    c.tube([(447, -12, 14), (441, 4, -14), (434, 12, -42)], [12, 11, 8], (0, "pulmonary_artery"))
    c.tube([(448, -14, 18), (446, 8, 34), (438, 18, 46)], [12, 10, 8], (0, "pulmonary_artery"))
    c.tube([(540, 4, -24), (505, -8, -26), (470, -20, -30), (415, -20, -27)], [6, 8, 9, 10], (0, "vein"))
    c.tube([(540, 4, 26), (500, -24, 22), (482, -28, -6), (472, -22, -28)], [5, 7, 7, 7], (0, "vein"))
    c.tube(
        [
            (400, -18, 6),
            (425, -26, -8),
            (450, -20, -12),
            (469, -4, 2),
            (464, 24, 17),
            (440, 38, 24),
            (400, 40, 22),
            (350, 34, 16),
            (300, 22, 8),
            (240, 14, 5),
            (178, 14, 2),
        ],
        [14, 15, 14, 13, 12, 12, 11.5, 11, 10, 9, 8.5],
        (0, "aorta"),
    )
    for y0, x0, top in ((-8, -4, -17), (-2, 6, 17), (4, 12, 32)):
        c.tube([(468, y0, x0), (500, y0 + 2, 0.5 * (x0 + top)), (548, y0 + 8, top)], [5.5, 4.5, 3.5], (0, "artery"))
    c.tube([(556, 12, 4), (500, 26, 4), (450, 34, 6), (385, 24, 8), (355, 12, 22), (344, 5, 38)], 7, (0, "oesophagus"))
    c.tube([(556, -8, 0), (500, 6, 0), (456, 18, 2)], 9.5, (0, "airway_wall"), (-1.8, "airway"))
    for side, name in ((-1, "right"), (1, "left")):
        hilum = np.array((436.0, 20.0, 34.0 * side))
        c.tube([(458, 18, 2), (448, 20, 16 * side), hilum], [8, 7.5, 6], (0, "airway_wall"), (-1.8, "airway"))
        rng = np.random.default_rng(11 + side)
        for aim in ((60, -20, 30), (10, -60, 45), (-25, 10, 70), (-80, 45, 40), (-60, -25, 55), (45, 45, 35)):
            direction = np.array(aim, float) * (1, 1, side)
            _branch(c, rng, hilum, direction / np.linalg.norm(direction), 4.2, 34.0, 6, name)
            c.tube(
                [hilum, hilum + 0.42 * direction],
                [3.8, 2.4],
                (0, "airway_wall"),
                (-1.4, "airway"),
                only=(f"lung_{name}", f"lung_vessel_{name}"),
            )
    c.tube([(470, -22, 14), (505, -14, 18)], [6, 8], (0, "pelvic_organ"))  # a remnant of the thymus, thyroid above it
    c.tube([(528, -12, -16), (545, -10, -17)], 8, (0, "pelvic_organ"), both_sides=True)


def _branch(c: Canvas, rng, start, direction, radius: float, length: float, depth: int, side: str) -> None:
    """A tree of pulmonary vessels, seen only where it runs through the lung."""
    end = start + length * direction
    c.tube([start, end], [radius, radius * 0.85], (0, f"lung_vessel_{side}"), only=(f"lung_{side}",))
    if depth:
        turn = rng.normal(size=3)
        turn -= turn @ direction * direction
        turn *= rng.uniform(0.45, 0.8) / np.linalg.norm(turn)
        for sign in (1, -0.8):
            child = direction + sign * turn
            _branch(
                c,
                rng,
                end,
                child / np.linalg.norm(child),
                max(radius * 0.78, 1.0),
                length * rng.uniform(0.7, 0.9),
                depth - 1,
                side,
            )


def _abdomen(c: Canvas, cavity: np.ndarray) -> None:
    inside = ("visceral_fat", "bowel", "muscle", "muscle_fat")
    c.ellipsoid((182, -26, 0), (84, 42, 92), (0, "bowel"), only=("visceral_fat",))
    c.ellipsoid((300, 30, -68), (30, 30, 30), (0, "visceral_fat"), only=inside)

    def liver(z, y, x):
        bulk = (np.sqrt(((z - 318) / 70) ** 2 + ((y + 4) / 82) ** 2 + ((x + 58) / 92) ** 2) - 1) * 70
        under = z - _diaphragm_z_mm(y, x) + 4  # visceral surface: from the right lower back to the left upper front
        return np.maximum(np.maximum(bulk, under), 318 - z - 0.55 * (-x) + 0.45 * (y + 10))

    window = c.window((235, -100, -140), (385, 100, 70))
    within = cavity[window]
    c.fill(window, (liver(*c.zyx[(slice(None), *window)]) < 0) & (within < -2), "liver", only=("visceral_fat", "bowel"))
    vessels = [
        [(300, -5, -30), (318, -8, -52), (326, 10, -92)],
        [(318, -8, -52), (335, -35, -80)],
        [(310, -10, -40), (322, -40, -18), (328, -50, 15)],
        [(355, 2, -28), (340, 15, -70), (325, 25, -105)],
        [(355, 0, -28), (348, -25, -60), (335, -55, -85)],
        [(356, 0, -26), (350, -30, -12), (338, -52, 0)],
    ]
    for waypoints in vessels:
        c.tube(waypoints, [6.5, *([5.0] * (len(waypoints) - 2)), 2.8], (0, "liver_vessel"), only=("liver",))
    c.tube([(262, -14, -8), (280, -8, -16), (302, -6, -32)], 6.5, (0, "vein"), only=("visceral_fat", "liver", "bowel"))
    c.tube(
        [(176, 18, -16), (240, 18, -19), (300, 12, -24), (355, 0, -27), (388, -12, -24)],
        [9, 10, 11, 12, 12],
        (0, "vein"),
    )
    c.ellipsoid((328, 44, 92), (40, 34, 19), (0, "spleen"), tilt_zx=12, tilt_zy=15)
    c.tube(
        [(349, 18, 62), (325, -12, 68), (294, -45, 52), (276, -52, 20), (278, -40, -10)],
        [29, 29, 25, 19, 12],
        (0, "stomach"),
        (-4, "stomach_lumen"),
        only=(*inside, "liver"),
    )
    for side, name, z0 in ((-1, "right", 272), (1, "left", 287)):
        centre = (z0, 44, 60 * side)
        c.ellipsoid(centre, (47, 19, 23), (6, "visceral_fat"), tilt_zx=-12 * side, only=inside)
        c.ellipsoid(centre, (44, 20, 24), (0, f"kidney_{name}"), (-7, f"kidney_medulla_{name}"), tilt_zx=-12 * side)
        c.ellipsoid((z0, 38, 49 * side), (17, 10, 13), (0, "visceral_fat"))
        c.tube([(z0, 36, 46 * side), (z0 + 4, 20, 10 * side)], 4, (0, "vein"), only=("visceral_fat",))
        top = np.array((z0 + 44, 30.0, 42 * side))
        for leg in ((-4, 14, -2 * side), (-8, 12, 9 * side)):
            c.tube([top, top + leg], 3, (0, f"adrenal_{name}"))
    c.tube(
        [(260, -12, -28), (272, -20, -4), (284, -12, 24), (296, 12, 56), (304, 32, 78)],
        [13, 9, 9, 8, 6],
        (0, "pancreas"),
        only=inside,
    )
    c.tube(
        [(278, -38, -14), (274, -20, -38), (250, -4, -44), (228, 4, -32), (224, 0, 0), (238, -6, 20)],
        10.5,
        (0, "duodenum"),
        only=inside,
    )
    c.ellipsoid((268, -50, -52), (22, 13, 12), (0, "gallbladder"), tilt_zy=-20)
    c.tube(
        [
            (132, -18, -84),
            (165, -4, -90),
            (215, 6, -92),
            (252, -6, -86),
            (246, -40, -66),
            (226, -62, -28),
            (222, -66, 8),
            (246, -58, 48),
            (292, -22, 88),
            (310, 10, 96),
            (270, 24, 96),
            (210, 20, 94),
            (150, 4, 90),
            (118, -10, 62),
            (102, 16, 30),
            (122, 30, 0),
            (100, 46, -4),
            (60, 42, 0),
            (36, 38, 0),
        ],
        [22, 21, 19, 18, 17, 17, 17, 17, 16, 15, 14, 13, 13, 13, 13, 14, 16, 15, 8],
        (0, "colon_wall"),
        (-3, "colon_lumen"),
        only=inside,
    )


def _pelvis(c: Canvas) -> None:
    c.tube(
        [(178, 14, 4), (140, 22, 30), (100, 8, 52), (55, -48, 62), (5, -52, 66)],
        [8, 7, 6, 5, 4.5],
        (0, "artery"),
        both_sides=True,
    )
    c.tube([(178, 20, -12), (138, 30, 20), (98, 16, 50), (50, -40, 60), (5, -44, 64)], [8, 7, 6, 6, 5], (0, "vein"))
    c.tube([(178, 20, -14), (138, 30, -34), (98, 16, -54), (50, -40, -60), (5, -44, -64)], [8, 7, 6, 6, 5], (0, "vein"))
    c.ellipsoid((78, -32, 0), (30, 30, 40), (0, "pelvic_organ"), (-3, "bladder"))
    c.ellipsoid((62, 10, 0), (24, 16, 26), (0, "pelvic_organ"), only=("visceral_fat", "muscle", "bowel"))
    c.ellipsoid((110, 78, 0), (40, 14, 46), (0, "hip"), (-2.6, "hip_marrow"), tilt_zy=-32)
    gluteal = ("fat", "visceral_fat")
    for side in (-1, 1):
        c.ellipsoid((92, 72, 76 * side), (62, 34, 54), (0, "muscle"), only=gluteal)
        hub = np.array((84.0, 10.0, 88.0 * side))
        crest, _ = curve([(122, -44, 112), (150, -22, 124), (168, 18, 114), (160, 55, 82), (132, 76, 48)], 1, 5.5)
        for point in crest * (1, 1, side):
            c.tube([hub, 0.5 * (hub + point) + (0, 0, -5 * side), point], [6, 3.2, 5], (0, "hip"), (-2.6, "hip_marrow"))
        socket = np.array((64.0, 2.0, 88.0 * side))
        c.ellipsoid((68, 2, 84 * side), (33, 31, 31), (0, "hip"), (-2.8, "hip_marrow"))
        c.tube([(60, 22, 76 * side), (24, 34, 62 * side)], 13, (0, "hip"), (-2.8, "hip_marrow"))
        c.tube([(62, -18, 72 * side), (46, -58, 9 * side)], [11, 9], (0, "hip"), (-2.8, "hip_marrow"))
        c.tube([(42, -54, 10 * side), (14, 22, 56 * side)], 7, (0, "hip"), (-2.6, "hip_marrow"))
        c.ellipsoid((50, 2, 104 * side), (34, 32, 32), (0, "muscle"), only=("hip", "hip_marrow"))
        c.tube(
            [socket, (48, 6, 120 * side)],
            [24, 15],
            (3, "cartilage"),
            (0, "femur"),
            (-2.8, "femur_marrow"),
            only=("hip", "hip_marrow", "muscle", "fat", "muscle_fat", "cartilage"),
        )
        c.tube(
            [(52, 10, 124 * side), (30, 4, 122 * side), (0, 0, 112 * side)],
            [18, 17, 15],
            (0, "femur"),
            (-4.5, "femur_marrow"),
        )
        c.ellipsoid(socket, (24, 24, 24), (0, "femur"), (-2.6, "femur_marrow"))
