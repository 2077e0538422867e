// Headers of cpu/loss_rows_simd.h, included before the instruction set is switched on (see there).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/loss_rows.h"
