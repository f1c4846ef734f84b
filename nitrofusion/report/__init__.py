"""Pages and pictures to look at: ``write_report`` for a whole run, ``save_preview`` while it trains."""

from .page import write_report
from .pictures import image_grid, save_preview

__all__ = ["image_grid", "save_preview", "write_report"]
