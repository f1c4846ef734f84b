"""The published table of one-step models, to stand beside ours, and how far two measurements of one model are apart."""

from __future__ import annotations

SOURCE = "NitroFusion (arXiv 2412.02030), Table 1: 5,000 captions of COCO"
UNKNOWN = (
    "The paper does not say which year's captions, which of an image's captions, which resize, which FID library, or "
    "how the baselines were sampled, so its rows and ours are not one protocol."
)
COLUMNS = ("clip_score", "fid", "aesthetic", "image_reward")
TITLES = {"clip_score": "CLIP score", "fid": "FID", "aesthetic": "Aesthetic", "image_reward": "ImageReward"}
ROWS = (
    ("SDXL base", 25, (0.320, 23.30, 5.58, 0.782)),
    ("SDXL-Turbo", 4, (0.317, 29.07, 5.51, 0.848)),
    ("SDXL-Turbo", 1, (0.318, 28.99, 5.38, 0.782)),
    ("SDXL-Lightning", 4, (0.312, 28.95, 5.75, 0.749)),
    ("SDXL-Lightning", 1, (0.313, 29.23, 5.65, 0.557)),
    ("Hyper-SDXL", 4, (0.314, 34.49, 5.87, 1.091)),
    ("Hyper-SDXL", 1, (0.317, 36.77, 6.00, 1.169)),
    ("DMD2", 4, (0.316, 24.57, 5.54, 0.880)),
    ("DMD2", 1, (0.320, 23.91, 5.47, 0.825)),
    ("NitroSD-Realism", 4, (0.313, 29.09, 5.60, 0.945)),
    ("NitroSD-Realism", 1, (0.320, 25.61, 5.56, 0.856)),
    ("NitroSD-Vibrant", 4, (0.312, 39.76, 5.85, 1.034)),
    ("NitroSD-Vibrant", 1, (0.314, 38.49, 5.92, 0.991)),
)
# NitroSD-Realism at one step and DMD2 at four, here and in a later paper (NAG).
NOISE = (
    "Two papers of the same authors measured the same two models 0.2 to 0.6 FID, up to 0.002 CLIP and 0.004 to 0.009 "
    "ImageReward apart. A gap of up to 0.6 FID, 0.003 CLIP or 0.01 ImageReward therefore says nothing."
)
DECIMALS = {"clip_score": 3, "fid": 2, "aesthetic": 2, "image_reward": 3}
