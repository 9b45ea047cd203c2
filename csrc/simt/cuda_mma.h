#pragma once
// The CUDA back end's tensor-core operations. Included by cuda.h.

namespace freqrank::simt {
inline namespace cuda {

SIMT_DEVICE tf32 to_tf32(float x) {
  tf32 out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out.bits) : "f"(x));
  return out;
}
SIMT_DEVICE float to_float(tf32 x) { return __uint_as_float(x.bits); }

// A lane's part of a matrix. Indices are constants after unrolling.
template <class E, Role R>
class Fragment {
 public:
  using Place = Layout<E, R>;
  using Element = typename Place::Element;
  static constexpr int count = Place::count;
  static constexpr int packed = sizeof(Element) < 4 ? 4 / static_cast<int>(sizeof(Element)) : 1;
  using Word = std::conditional_t<(sizeof(Element) < 4), unsigned, Element>;

  Fragment() = default;
  SIMT_DEVICE explicit Fragment(Element value) { fill(value); }
  SIMT_DEVICE static int row(int i) { return Place::row(lane(), i); }
  SIMT_DEVICE static int col(int i) { return Place::col(lane(), i); }

  SIMT_DEVICE void set(int i, Element value) {
    if constexpr (packed == 1) {
      words[i] = value;
    } else {
      constexpr int bits = 8 * static_cast<int>(sizeof(Element));
      const int shift = i % packed * bits;
      words[i / packed] = (words[i / packed] & ~(((1u << bits) - 1) << shift)) | raw(value) << shift;
    }
  }
  SIMT_DEVICE Element get(int i) const {
    if constexpr (packed == 1) {
      return words[i];
    } else {
      constexpr int bits = 8 * static_cast<int>(sizeof(Element));
      const unsigned piece = words[i / packed] >> i % packed * bits;
      if constexpr (bits == 8)
        return static_cast<Element>(piece & 0xffu);
      else
        return Element{static_cast<std::uint16_t>(piece & 0xffffu)};
    }
  }
  SIMT_DEVICE void set_at(int i, int /*row*/, int /*col*/, Element value) { set(i, value); }
  SIMT_DEVICE Element get_at(int i, int /*row*/, int /*col*/) const { return get(i); }
  // `packed` neighbours along the depth at once.
  SIMT_DEVICE void set_pack(int i, pack<Element, packed> values) { memcpy(&words[i / packed], &values, sizeof values); }
  SIMT_DEVICE void set_register(int j, unsigned bits) { memcpy(&words[j], &bits, 4); }
  SIMT_DEVICE void fill(Element value) {
    SIMT_UNROLL
    for (int i = 0; i < count; ++i) set(i, value);
  }

  Word words[count / packed];

 private:
  SIMT_DEVICE static unsigned raw(Element value) {
    if constexpr (sizeof(Element) == 1)
      return static_cast<unsigned char>(value);
    else
      return value.bits;
  }
};
template <class E>
using FragmentA = Fragment<E, Role::a>;
template <class E>
using FragmentB = Fragment<E, Role::b>;
template <class E>
using Accumulator = Fragment<E, Role::accumulator>;

// ldmatrix: lane 8j + r gives the index in `from` of the 16 bytes that are row r of matrix j.
template <int Count, bool Transposed, class E>
SIMT_DEVICE pack<unsigned, Count> load_matrices(shared<E> from, int i) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  static_assert(!Transposed || sizeof(E) == 2, "transposed matrices have 2-byte elements");
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(from.address() + i));
  pack<unsigned, Count> r;
  if constexpr (Count == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (!Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  return r;
}

// sum += a b.
SIMT_DEVICE void mma(Accumulator<bfloat16>& sum, const FragmentA<bfloat16>& a, const FragmentB<bfloat16>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum.words[0]), "+f"(sum.words[1]), "+f"(sum.words[2]), "+f"(sum.words[3])
      : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), "r"(b.words[1]));
}
SIMT_DEVICE void mma(Accumulator<float16>& sum, const FragmentA<float16>& a, const FragmentB<float16>& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum.words[0]), "+f"(sum.words[1]), "+f"(sum.words[2]), "+f"(sum.words[3])
               : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), "r"(b.words[1]));
}
SIMT_DEVICE void mma(Accumulator<tf32>& sum, const FragmentA<tf32>& a, const FragmentB<tf32>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum.words[0]), "+f"(sum.words[1]), "+f"(sum.words[2]), "+f"(sum.words[3])
      : "r"(a.words[0].bits), "r"(a.words[1].bits), "r"(a.words[2].bits), "r"(a.words[3].bits), "r"(b.words[0].bits),
        "r"(b.words[1].bits));
}
SIMT_DEVICE void mma(Accumulator<std::int8_t>& sum, const FragmentA<std::int8_t>& a, const FragmentB<std::int8_t>& b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(sum.words[0]), "+r"(sum.words[1]), "+r"(sum.words[2]), "+r"(sum.words[3])
               : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), "r"(b.words[1]));
}
SIMT_DEVICE void mma(Accumulator<double>& sum, const FragmentA<double>& a, const FragmentB<double>& b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(sum.words[0]), "+d"(sum.words[1])
               : "d"(a.words[0]), "d"(b.words[0]));
}
// Sixteen rows and Steps times four of depth at once: one instruction where the GPU has it (PTX ISA, m16n8k4, k8 and
// k16 for f64: its operands are those of m8n8k4 side by side), and two times Steps of them elsewhere.
template <int Steps>
SIMT_DEVICE void mma(Accumulator<double> (&sum)[2], const FragmentA<double> (&a)[Steps][2],
                     const FragmentB<double> (&b)[Steps]) {
  static_assert(Steps == 1 || Steps == 2 || Steps == 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  double &c0 = sum[0].words[0], &c1 = sum[0].words[1], &c2 = sum[1].words[0], &c3 = sum[1].words[1];
  if constexpr (Steps == 1) {
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+d"(c0), "+d"(c1), "+d"(c2), "+d"(c3)
                 : "d"(a[0][0].words[0]), "d"(a[0][1].words[0]), "d"(b[0].words[0]));
  } else if constexpr (Steps == 2) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+d"(c0), "+d"(c1), "+d"(c2), "+d"(c3)
        : "d"(a[0][0].words[0]), "d"(a[0][1].words[0]), "d"(a[1][0].words[0]), "d"(a[1][1].words[0]),
          "d"(b[0].words[0]), "d"(b[1].words[0]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7,%8,%9,%10,%11}, "
        "{%12,%13,%14,%15}, {%0,%1,%2,%3};"
        : "+d"(c0), "+d"(c1), "+d"(c2), "+d"(c3)
        : "d"(a[0][0].words[0]), "d"(a[0][1].words[0]), "d"(a[1][0].words[0]), "d"(a[1][1].words[0]),
          "d"(a[2][0].words[0]), "d"(a[2][1].words[0]), "d"(a[3][0].words[0]), "d"(a[3][1].words[0]),
          "d"(b[0].words[0]), "d"(b[1].words[0]), "d"(b[2].words[0]), "d"(b[3].words[0]));
  }
#else
  SIMT_UNROLL
  for (int s = 0; s < Steps; ++s) {
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) mma(sum[h], a[s][h], b[s]);
  }
#endif
}

}  // namespace cuda
}  // namespace freqrank::simt
