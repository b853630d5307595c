// Every kernel body, for the instruction set that the including isa_*.cpp names, and its table.
// Nothing here may leave a symbol that another object could share: no standard library, helpers in
// unnamed namespaces.

#include "../features.h"
#include "../kernels.h"
#include "../simd.h"
#include "../simd_ints.h"
#include "../threading.h"

#include "runs.inl.h"
#include "pairs.inl.h"
#include "panel.inl.h"
#include "rows.inl.h"
#include "narrow.inl.h"
#include "product.inl.h"
#include "activation.inl.h"
#include "bottleneck.inl.h"
#include "quantize.inl.h"
#include "optimizer.inl.h"
#include "sparse.inl.h"
#include "prefix.inl.h"
#include "dora.inl.h"
#include "gated.inl.h"
#include "int8.inl.h"

namespace pk {

extern const Kernels PK_KERNELS;
const Kernels PK_KERNELS = {
    PK_NAME,
    PK_ISA::product,
    PK_ISA::quantize_4bit,
    PK_ISA::dequantize,
    PK_ISA::quantize_absmax,
    PK_ISA::quantize_8bit,
    PK_ISA::dropout,
    PK_ISA::bottleneck_forward,
    PK_ISA::bottleneck_backward,
    PK_ISA::optimizer_step,
    PK_ISA::square_sums,
    PK_ISA::sparse_product,
    PK_ISA::prefix_forward,
    PK_ISA::prefix_backward,
    PK_ISA::row_squares,
    PK_ISA::dora_norm,
    PK_ISA::column_dots,
    PK_ISA::gated,
    PK_ISA::int8_product,
};

} // namespace pk
