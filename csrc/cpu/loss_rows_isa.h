// What cpu/loss_rows_simd.h needs, included before an instruction set is switched on (see there).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/loss_rows.h"
