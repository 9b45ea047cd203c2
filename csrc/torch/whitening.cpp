// CPU adapters of the whitening family: check, allocate through torch, run.
#include "torch/adapter.h"
