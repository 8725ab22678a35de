/* The operators of surgeon for the CPU, in one file for the compiler. */
#include "lanes.h"
#include "gemm.h"
#include "window.h"
#include "acda.h"
#include "dconv.h"
#include "dconv_layer.h"
#include "pafu.h"
#include "pafu_back.h"

int surgeon_abi(void) { return 1; }
int surgeon_lanes(void) { return LANES; }
