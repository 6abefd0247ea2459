// What is added to a product of BF12 weights: the few that have an exponent of their own, one by one, after all others.
namespace penstock::PENSTOCK_ISA {

static void add_rare(const Weight& weight, const Rows& rows, int m, int col, int cols, float* c, std::size_t c_stride) {
    for (int j = 0; j < cols; j += COLUMNS) {
        const RareWeights& rare = weight.rare[(col + j) / COLUMNS];
        for (const RareWeight* r = rare.data; r < rare.data + rare.num; r++) {
            const bf16* a = static_cast<const bf16*>(rows.data) + r->k;
            float* to = c + j + r->column;
            for (int i = 0; i < m; i++) to[i * c_stride] += widen(a[i * rows.stride]) * widen(r->value);
        }
    }
}

}  // namespace penstock::PENSTOCK_ISA
