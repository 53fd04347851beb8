"""The tissues of the phantom: their CT numbers, what contrast medium adds, and the organ label that each belongs to."""

import dataclasses

import numpy as np

VERTEBRAE = ("C7", *(f"T{i}" for i in range(1, 13)), *(f"L{i}" for i in range(1, 6)))


@dataclasses.dataclass(frozen=True)
class Tissue:
    """One kind of tissue: CT number without contrast medium, and what full arterial and portal phases add to it.

    Attributes:
      label: name in LABELS, "" for none.
      hu, arterial_hu, portal_hu: CT number, added by contrast.
      texture_hu: standard deviation of its own grain.
    """

    label: str
    hu: float
    arterial_hu: float = 0.0
    portal_hu: float = 0.0
    texture_hu: float = 4.0


# fmt: off
TISSUES: dict[str, Tissue] = {
    "air": Tissue("", -1024, texture_hu=0),
    "skin": Tissue("fat", 5),
    "fat": Tissue("fat", -103, texture_hu=7),
    "muscle": Tissue("muscle", 52, 6, 12, texture_hu=9),
    "muscle_fat": Tissue("muscle", 15, 4, 8, texture_hu=22),
    "visceral_fat": Tissue("fat", -104, 2, 4, texture_hu=12),
    "lung_right": Tissue("lung_right", -855, 5, 5, texture_hu=26),
    "lung_left": Tissue("lung_left", -855, 5, 5, texture_hu=26),
    "lung_vessel_right": Tissue("lung_right", 30, 170, 110),
    "lung_vessel_left": Tissue("lung_left", 30, 170, 110),
    "airway_wall": Tissue("trachea", -20, 10, 10),
    "airway": Tissue("trachea", -995, texture_hu=2),
    "heart": Tissue("heart", 46, 45, 55),
    "heart_left": Tissue("heart", 42, 250, 105),
    "heart_right": Tissue("heart", 42, 200, 100),
    "aorta": Tissue("aorta", 42, 260, 105),
    "artery": Tissue("muscle", 42, 240, 105),
    "vein": Tissue("vena_cava", 40, 60, 100),
    "pulmonary_artery": Tissue("heart", 42, 230, 105),
    "oesophagus": Tissue("oesophagus", 36, 12, 20),
    "liver": Tissue("liver", 58, 12, 50, texture_hu=6),
    "liver_vessel": Tissue("liver", 42, 20, 150),
    "spleen": Tissue("spleen", 49, 70, 68, texture_hu=5),
    "stomach": Tissue("stomach", 45, 25, 35),
    "stomach_lumen": Tissue("stomach", 18, texture_hu=14),
    "kidney_right": Tissue("kidney_right", 34, 130, 130),
    "kidney_left": Tissue("kidney_left", 34, 130, 130),
    "kidney_medulla_right": Tissue("kidney_right", 30, 50, 115),
    "kidney_medulla_left": Tissue("kidney_left", 30, 50, 115),
    "pancreas": Tissue("pancreas", 40, 55, 45, texture_hu=12),
    "adrenal_right": Tissue("adrenal_right", 32, 35, 30),
    "adrenal_left": Tissue("adrenal_left", 32, 35, 30),
    "gallbladder": Tissue("gallbladder", 8, texture_hu=3),
    "duodenum": Tissue("duodenum", 34, 20, 30, texture_hu=14),
    "bowel": Tissue("bowel", 30, 15, 30, texture_hu=12),
    "colon_wall": Tissue("colon", 40, 15, 25),
    "colon_lumen": Tissue("colon", 15, texture_hu=25),
    "bladder": Tissue("bladder", 5, texture_hu=3),
    "pelvic_organ": Tissue("muscle", 46, 18, 40),
    "disc": Tissue("disc", 88, 3, 5),
    "cord": Tissue("spinal_canal", 28),
    "cartilage": Tissue("rib_cage", 105, texture_hu=10),
    "rib": Tissue("rib_cage", 420, texture_hu=45),
    "rib_marrow": Tissue("rib_cage", 190, texture_hu=35),
    "sternum": Tissue("sternum", 330, texture_hu=40),
    "sternum_marrow": Tissue("sternum", 120, texture_hu=25),
    "shoulder": Tissue("shoulder", 520, texture_hu=50),
    "shoulder_marrow": Tissue("shoulder", 190, texture_hu=30),
    "hip": Tissue("hip", 560, texture_hu=50),
    "hip_marrow": Tissue("hip", 190, texture_hu=40),
    "femur": Tissue("femur", 700, texture_hu=50),
    "femur_marrow": Tissue("femur", 230, texture_hu=40),
    "arm_fat": Tissue("arm", -103, texture_hu=7),
    "arm_muscle": Tissue("arm", 52, 5, 10, texture_hu=9),
    "arm_bone": Tissue("arm", 650, texture_hu=50),
    **{f"{name}{part}": Tissue(name, hu, texture_hu=grain)
       for name in VERTEBRAE for part, hu, grain in (("", 480, 50), ("_marrow", 165, 32))},
}
# fmt: on
NAMES = list(TISSUES)
CODES = {name: code for code, name in enumerate(NAMES)}
LABELS: dict[int, str] = dict(enumerate(dict.fromkeys(t.label or "background" for t in TISSUES.values())))
# Labels that are learnt within minutes, even from small crops, which show no place in the body.
LEARNT_SOON = ("lung_right", "lung_left", "liver", "rib_cage", "muscle", "fat")
LABEL_OF_TISSUE = np.array(
    [{v: k for k, v in LABELS.items()}[t.label or "background"] for t in TISSUES.values()], np.uint8
)
