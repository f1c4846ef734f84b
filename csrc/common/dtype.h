// Storage types as the Python side numbers them (nitrokernels/_native.py: DTYPES).
#pragma once

enum NitroDtype { NITRO_F32 = 0, NITRO_F16 = 1, NITRO_BF16 = 2 };
