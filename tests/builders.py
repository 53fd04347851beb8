"""Small stores for tests."""

import hashlib

import numpy as np

from alice_jax.data.scan import Scan
from alice_jax.data.store import Store


def make_scan(id: str, shape_zyx: tuple[int, int, int]) -> Scan:
    """A scan at 2 mm whose stored frame is its file's."""
    return Scan(
        id=id,
        file=f"{id}.nii.gz",
        sha256=hashlib.sha256(id.encode()).hexdigest(),
        patient=id,
        shape_zyx=shape_zyx,
        spacing_zyx_mm=(2.0, 2.0, 2.0),
        origin_xyz_lps_mm=(0.0, 0.0, 0.0),
        direction=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        foreground_box_zyx_vox=((0, 0, 0), shape_zyx),
        original={"affine_ras": np.diag([-2.0, -2.0, 2.0, 1.0]).tolist(), "shape_ijk": list(shape_zyx[::-1])},
    )


def add_volume(store: Store, id: str, volume_zyx: np.ndarray) -> None:
    """Writes int16 HU with a foreground that is all of it."""
    foreground = np.ones([-(-n // 2) for n in volume_zyx.shape], bool)
    store.write_scan(make_scan(id, volume_zyx.shape), volume_zyx.astype(np.int16), foreground)


def noise_store(path: str, scans: int = 5, shape_zyx: tuple[int, int, int] = (40, 36, 44)) -> Store:
    """Scans case0, case1, … of smooth-free noise between −125 and 225 HU, each another draw."""
    store = Store.create(path, spacing_zyx_mm=(2.0, 2.0, 2.0))
    for i in range(scans):
        add_volume(store, f"case{i}", np.random.default_rng(i).integers(-125, 225, shape_zyx))
    return store
