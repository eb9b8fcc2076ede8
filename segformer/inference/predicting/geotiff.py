"""Masks as TIFF, by rows: of georeferenced images, whose system and transform they keep, and of large ones.

Tiled, deflated, pixel values are class ids, colors the palette. rasterio (the extra `geo`) reads and
writes; files beside the image (.tfw, .aux.xml) are not looked at. An image that is stored turned has none.
"""

import importlib.util
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.data.shards.tiling import Size
from segformer.data.sources.decode import FileBytes
from segformer.data.sources.picture import image_orientation
from segformer.errors import ConfigError, reraise_as
from segformer.files import staged

NEEDED = "pip install 'rasterio>=1.4'"


@dataclass(frozen=True, slots=True)
class Reference:
    """Where on earth an image is."""

    crs: Any
    transform: Any
    area: float | None
    "Square meters of a pixel, of a projected system."


def writing(place: object) -> AbstractContextManager[None]:
    """ConfigError that names the place where it can't be written."""
    return reraise_as(ConfigError, f"{place} can't be written", "choose another folder")


def there() -> bool:
    """rasterio is installed."""
    return importlib.util.find_spec("rasterio") is not None


def _rasterio() -> Any:
    with reraise_as(ConfigError, "masks as TIFF need rasterio", NEEDED, on=ImportError):
        import rasterio
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio


def reference(path: Path) -> Reference | None:
    """The reference of a GeoTIFF; None of other files, and without rasterio."""
    if path.suffix.lower() not in (".tif", ".tiff") or not there():
        return None
    rasterio = _rasterio()
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
        try:
            with rasterio.open(path.absolute(), driver="GTiff") as file:
                crs, transform = file.crs, file.transform
        except rasterio.errors.RasterioError:  # tifffile has read it: a kind that GDAL has not
            return None
        if crs is None or image_orientation(FileBytes(path)) != 1:
            return None
        meters = crs.linear_units_factor[1] if crs.is_projected else None
    return Reference(crs, transform, None if meters is None else abs(transform.determinant) * meters**2)


def write_strips(
    strips: Iterable[np.ndarray], size: Size, palette: np.ndarray, path: Path, place: Reference | None
) -> None:
    """Write a mask that comes in strips of rows."""
    rasterio = _rasterio()
    layout = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": size[0], "width": size[1]}
    layout |= {"tiled": True, "compress": "deflate", "bigtiff": "if_safer"}
    layout |= {"crs": place.crs, "transform": place.transform} if place else {}
    with (
        rasterio.Env(GDAL_CACHEMAX=64, GDAL_PAM_ENABLED="NO"),
        reraise_as(OSError, "GDAL", on=rasterio.errors.RasterioError),
        staged(path, durable=False) as temporary,
        rasterio.open(temporary, "w", **layout) as file,
    ):
        file.write_colormap(1, {k: tuple(color) for k, color in enumerate(palette.tolist())})
        top = 0
        for strip in strips:
            file.write(strip, 1, window=((top, top + len(strip)), (0, size[1])))
            top += len(strip)
