// x86 with AVX-512 F, BW, DQ, VL and VNNI: 32 registers of 16 lanes.
#define VLRT_LEVEL kAvx512Vnni
#define VLRT_NAME "avx512_vnni"
#define VLRT_LANES 16
#include "linear.inc"
