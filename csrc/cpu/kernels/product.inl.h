// Which kernel multiplies: by the number of rows and the shape, never by their content.

namespace pk::PK_ISA {
namespace {

int product(const Product& p) {
    if (p.m == 0 || p.n == 0)
        return kOk;
    double microseconds = 0.0;
    for (int n = 0; n < p.segments; ++n) {
        const Segment& segment = segment_of(p, n);
        double weights = (double)p.n * (double)segment.depth;
        int64_t rows = min64(segment.row_end, p.m) - segment.row_begin;
        microseconds += weights * (1e-4 + (double)rows * 3e-5) / V::kSpeed;
    }
    int threads = worthwhile_threads(p.threads, microseconds);
    if (narrow_kernel_serves(p))
        return narrow_product(p, threads);
    return row_kernel_serves(p) ? row_product(p, threads) : panel_product(p, threads);
}

} // namespace
} // namespace pk::PK_ISA
