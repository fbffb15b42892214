// x86 with AVX-512 F, BW, DQ and VL: 32 registers of 16 lanes.
#define VLRT_LEVEL kAvx512
#define VLRT_NAME "avx512"
#define VLRT_LANES 16
#define VLRT_BROADCASTS 8
#include "tile.inc"
