// CPU adapters of the dct family: check, allocate through torch, run.
#include "torch/adapter.h"
