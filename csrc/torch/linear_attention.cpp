// CPU adapters of the linear_attention family: check, allocate through torch, run.
#include "torch/adapter.h"
