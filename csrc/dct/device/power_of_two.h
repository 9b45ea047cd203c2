#pragma once
// Cosine transforms of types II, III and IV whose length n is a power of two from 32 to 8192, computed in float: a
// complex FFT of length m = n / 2 in registers. What each lane holds is in power_of_two_shape.h.
//
// Type II: v_i = x_2i, v_n-1-i = x_2i+1, and z_j = v_2j + i v_2j+1. Four neighbours x_4j .. x_4j+3 are z_j = (x_4j,
// x_4j+2) and z_m-1-j = (x_4j+3, x_4j+1), so a lane that holds the columns c and columns-1-c loads vectors and needs
// nobody else. With Z the FFT of z, E = Z_k + conj Z_m-k, O = Z_k - conj Z_m-k and r = exp(-i pi / 2n)
//   A = r^k E,  B = i r^5k O,  y_k - i y_n-k = A - B,  y_m-k + i y_m+k = exp(i pi / 4) (A + B),
// so a lane that holds the classes c and classes-c needs nobody else here either. Lane 0 holds the classes 0 and
// classes / 2, each its own partner; k = 0 and m / 2 there make up one pair. Type III is the transpose, run backwards:
// an inverse FFT is a forward one with real and imaginary parts exchanged.
// Type IV: z_j = (x_2j + i x_n-1-2j) exp(-i pi j / n), U = 2 exp(-i pi (4k + 1) / 4n) Z_k, y_2k + ... = Re U_k,
// y_n-1-2k = -Im U_k; partners are k and m-1-k.
//
// The transposes between stages and between the order of the FFT and that of memory go through shared memory. Rows of
// up to 2048 elements stay within a warp, which waits for no other. Tables fill shared memory once a block; blocks
// loop over tiles of rows.

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dct/device/params.h"
#include "dct/device/power_of_two_shape.h"
#include "dct/device/root_table.h"

namespace freqrank::dct::device {

// cos(pi i / 32) for 0 <= i <= 32
FREQRANK_INLINE constexpr double cosine_32(int i) {
  constexpr double c[] = {1,
                          0.99518472667219688624,
                          0.98078528040323044913,
                          0.95694033573220886494,
                          0.92387953251128675613,
                          0.88192126434835502971,
                          0.83146961230254523708,
                          0.77301045336273696081,
                          0.70710678118654752440,
                          0.63439328416364549822,
                          0.55557023301960222474,
                          0.47139673682599764856,
                          0.38268343236508977173,
                          0.29028467725446236764,
                          0.19509032201612826785,
                          0.09801714032956060199,
                          0};
  return i <= 16 ? c[i] : -c[32 - i];
}

// The codelets' butterflies, and 32 = 2 x 16.
template <int R>
SIMT_DEVICE void fft(Complex<float>* a) {
  if constexpr (R == 32) {
    Complex<float> even[16], odd[16];
    SIMT_UNROLL
    for (int i = 0; i < 16; ++i) {
      even[i] = a[2 * i];
      odd[i] = a[2 * i + 1];
    }
    butterfly<16>(even);
    butterfly<16>(odd);
    SIMT_UNROLL
    for (int k = 0; k < 16; ++k) {
      const float c = static_cast<float>(cosine_32(2 * k));
      const float s = static_cast<float>(-cosine_32(k < 8 ? 16 - 2 * k : 2 * k - 16));
      const Complex<float> b = k == 0   ? odd[k]
                               : k == 8 ? Complex<float>{odd[k].im, -odd[k].re}
                                        : odd[k] * Complex<float>{c, s};
      a[k] = even[k] + b;
      a[k + 16] = even[k] - b;
    }
  } else {
    butterfly<R>(a);
  }
}

template <int N>
struct PowerOfTwo {
  static constexpr const char* name = "dct_power_of_two";
  static constexpr PowerOfTwoShape shape = power_of_two_shape(N);
  static_assert(shape.valid());
  static constexpr int max_threads = PowerOfTwoShape::max_threads, min_blocks = shape.min_blocks();

  static constexpr int M = shape.m(), A = shape.a, Q = shape.q, B = shape.b;
  static constexpr int R = 2 * A, G = shape.lanes(), C = shape.columns(), D = shape.classes();
  static constexpr int group_lanes = shape.group_lanes(), group_rows = shape.group_rows();
  static constexpr int group_floats = shape.group_floats();
  static constexpr int pitch_across = shape.pitch_across();
  static constexpr int exchange_step = shape.exchange_step(), exchange_pitch = shape.exchange_pitch();
  static constexpr int first_table = shape.first_table(), middle_table = shape.middle_table();
  static constexpr int last_table = shape.last_table(), table_floats = shape.table_floats();
  static constexpr int groups_at = shape.groups_at(), starts_at = shape.starts_at();
  static constexpr bool two_classes = B == A;
  static constexpr float half_root = 0.70710678118654752440f;
  using Number = Complex<float>;
  using Floats = simt::shared<float>;

  // How rows come and go.
  enum class Path {
    vectors,  // elements of a row beside each other and aligned: lanes move what they hold, four at a time
    staged,   // the same, by way of shared memory
    general,  // any strides, crops and pads
  };

  struct Params {
    simt::const_global_bytes in;
    simt::global_bytes out;
    Dtype from, to;
    int type;
    Path load, store;
    Index in_stride, out_stride;  // along the row
    int filled, out_size;
    bool in_by_row, out_by_row;  // in general paths neighbouring threads take neighbouring rows
    int row_bits;                // a block has 2^row_bits rows
    double scale, in_end, out_end;
    Batch batch;  // one dimension at most, unless the paths are general
  };

  // What the paths below know of their thread.
  struct Place {
    int g;         // lane within the row
    int in_group;  // lane within the group
    int row;       // of the group
    Floats group;  // the group's part of shared memory
    Floats tables;
    Index first;  // the group's first row in the batch
    int left;     // rows of the group that the batch has
  };

  SIMT_DEVICE static void sync() {
    if constexpr (G > 32) {
      simt::barrier();
    } else {
      simt::warp_barrier();
    }
  }

  SIMT_DEVICE static Number load_number(Floats at, int i) {
    const auto v = at.template load_vector<2>(2 * i);
    return {v[0], v[1]};
  }
  SIMT_DEVICE static void store_number(Floats at, int i, Number v) {
    at.template store_vector<2>(2 * i, {{v.re, v.im}});
  }
  SIMT_DEVICE static Number swapped(Number v) { return {v.im, v.re}; }
  SIMT_DEVICE static Number choose(bool first, Number a, Number b) {
    return {first ? a.re : b.re, first ? a.im : b.im};
  }

  // --- tables ---

  SIMT_DEVICE static Number root(int k, double factor) {
    const Complex<double> w = binary_root(k);
    return {static_cast<float>(factor * w.re), static_cast<float>(factor * w.im)};
  }

  // The spectrum index of pair i of lane g: y_k, y_m-k and so on; the pair 0 of lane 0 is k = 0 and m / 2.
  SIMT_DEVICE static int pair_index(int i, int g, bool classes_of_two) {
    return g == 0 && classes_of_two && 2 * i >= A ? C / 2 + C * (i - A / 2) : g + (classes_of_two ? C : G) * i;
  }

  SIMT_DEVICE static void fill_tables(const Params& p, Floats tables) {
    constexpr int turn = RootTable::period;
    const Floats first = tables + first_table, middle = tables + middle_table, last = tables + last_table;
    const bool four = p.type == 4;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < M; i += simt::threads()) {
      const int column = i % C, k = i / C;
      store_number(first, i, root(column * (four ? 4 * k + 1 : 4 * k) * (turn / (4 * M)), 1.0));
    }
    if constexpr (Q > 1) {
      SIMT_NO_UNROLL
      for (int i = simt::thread(); i < Q * B; i += simt::threads()) {
        store_number(middle, i, root((i % B) * (i / B) * (turn / (Q * B)), 1.0));
      }
    }
    const double end = p.type == 2 ? p.out_end : p.in_end;
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < A * G; i += simt::threads()) {
      const int g = i % G, pair = i / G;
      Number one, other;
      if (four) {
        const int k = g + (two_classes ? C : G) * pair;
        one = root((4 * k + 1) * (turn / (8 * N)), 2.0 * p.scale);
        other = root((4 * (M - 1 - k) + 1) * (turn / (8 * N)), 2.0 * p.scale);
      } else if (i == 0) {
        one = root(turn / 16, 2.0 * p.scale);
        other = {static_cast<float>(2.0 * p.scale * end), static_cast<float>(1.41421356237309504880 * p.scale)};
      } else {
        const int k = pair_index(pair, g, p.type == 3 || two_classes);
        one = root(k * (turn / (4 * N)), p.scale);
        other = root(5 * k * (turn / (4 * N)) - turn / 4, p.scale);  // i r^5k
      }
      last.template store_vector<4>(4 * i, {{one.re, one.im, other.re, other.im}});
    }
  }

  // --- global memory ---

  // The vectors of four that a lane holds: numbers c + C t of its columns, t < A / 2, in the order of take_vector.
  SIMT_DEVICE static int vector_of(int i, int g) { return i < A / 2 ? g + C * i : C - 1 - g + C * (i - A / 2); }

  SIMT_DEVICE static void take_vector(Number* a, int i, simt::pack<float, 4> v) {
    const int at = i < A / 2 ? i : A + i - A / 2, mirrored = i < A / 2 ? R - 1 - i : A - 1 - (i - A / 2);
    a[at] = {v[0], v[2]};
    a[mirrored] = {v[3], v[1]};
  }

  template <class S>
  SIMT_DEVICE static void load_vectors(const Params& p, const Place& at, Number* a) {
    const auto from = p.in.template as<S>() + (at.first + at.row) * p.batch.in_stride[0];
    const bool inside = at.row < at.left;
    simt::pack<S, 4> raw[A];
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      raw[i] = inside ? from.template load_vector<4>(4 * vector_of(i, at.g)) : simt::pack<S, 4>{};
    }
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      take_vector(a, i,
                  {{simt::to_float(raw[i][0]), simt::to_float(raw[i][1]), simt::to_float(raw[i][2]),
                    simt::to_float(raw[i][3])}});
    }
  }

  // Vector i, after the last stage, of type III: numbers k_i and m-1-k_i are a[i] and a[A + i].
  template <class S>
  SIMT_DEVICE static void store_vectors(const Params& p, const Place& at, const Number* a) {
    if (at.row >= at.left) return;
    const auto to = p.out.template as<S>() + (at.first + at.row) * p.batch.out_stride[0];
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const Vector v = give_vector(a, i, at.g);
      to.template store_vector<4>(4 * v.index, {{simt::from_float<S>(v.value[0]), simt::from_float<S>(v.value[1]),
                                                 simt::from_float<S>(v.value[2]), simt::from_float<S>(v.value[3])}});
    }
  }

  struct Vector {
    int index;
    simt::pack<float, 4> value;
  };
  SIMT_DEVICE static Vector give_vector(const Number* a, int i, int g) {
    const bool upper = two_classes && 2 * i >= A;
    const Number k = upper ? a[A + i] : a[i], mirrored = upper ? a[i] : a[A + i];
    const int index = g + D * i;
    return {upper ? M - 1 - index : index, {{k.re, mirrored.im, k.im, mirrored.re}}};
  }

  // Whole rows between global and shared memory, V elements at a time, those of a group side by side. A thread's
  // first piece, and the way to the next one.
  template <int V>
  struct Pieces {
    static constexpr int in_row = N / V, count = group_rows * in_row / group_lanes;
    static constexpr bool many = in_row >= group_lanes;  // pieces of a row for each thread
    static constexpr int row_step = many ? 1 : group_lanes / in_row, turns = many ? in_row / group_lanes : 1;
    int row, column;
    SIMT_DEVICE explicit Pieces(int in_group)
        : row(many ? 0 : in_group / in_row), column(V * (many ? in_group : in_group % in_row)) {}
    SIMT_DEVICE int row_of(int i) const { return row + row_step * (i / turns); }
    SIMT_DEVICE int column_of(int i) const { return column + V * group_lanes * (i % turns); }
  };

  template <class S, int V>
  SIMT_DEVICE static void load_staged(const Params& p, const Place& at, int pitch) {
    const Pieces<V> pieces(at.in_group);
    constexpr int count = Pieces<V>::count, batch = count < 8 ? count : 8;
    const Index stride = p.batch.in_stride[0], step = stride * Pieces<V>::row_step;
    auto from = p.in.template as<S>() + (at.first + pieces.row) * stride + pieces.column;
    SIMT_UNROLL
    for (int start = 0; start < count; start += batch) {
      simt::pack<S, V> raw[batch];
      SIMT_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (start + i > 0 && (start + i) % Pieces<V>::turns == 0) from = from + step;
        raw[i] = pieces.row_of(start + i) < at.left
                     ? from.template load_vector<V>(pieces.column_of(start + i) - pieces.column)
                     : simt::pack<S, V>{};
      }
      SIMT_UNROLL
      for (int i = 0; i < batch; ++i) {
        simt::pack<float, V> v;
        SIMT_UNROLL
        for (int e = 0; e < V; ++e) v[e] = simt::to_float(raw[i][e]);
        at.group.template store_vector<V>(pieces.row_of(start + i) * pitch + pieces.column_of(start + i), v);
      }
    }
  }

  template <class S, int V>
  SIMT_DEVICE static void store_staged(const Params& p, const Place& at, int pitch) {
    const Pieces<V> pieces(at.in_group);
    const Index stride = p.batch.out_stride[0], step = stride * Pieces<V>::row_step;
    auto to = p.out.template as<S>() + (at.first + pieces.row) * stride + pieces.column;
    SIMT_UNROLL
    for (int i = 0; i < Pieces<V>::count; ++i) {
      if (i > 0 && i % Pieces<V>::turns == 0) to = to + step;
      if (pieces.row_of(i) >= at.left) continue;
      const auto v = at.group.template load_vector<V>(pieces.row_of(i) * pitch + pieces.column_of(i));
      simt::pack<S, V> raw;
      SIMT_UNROLL
      for (int e = 0; e < V; ++e) raw[e] = simt::from_float<S>(v[e]);
      to.template store_vector<V>(pieces.column_of(i) - pieces.column, raw);
    }
  }

  // Any strides: element by element, all rows of the block together. `starts` says where they start, in the input and
  // then in the output.
  struct Element {
    int row, index;
  };
  // Across rows a warp takes a sector's worth of them, S, and 32 / S elements of each.
  template <int S>
  SIMT_DEVICE static Element element_of(int thread_index, int row_bits, bool by_row) {
    constexpr int bits = S == 8 ? 3 : 4;
    const unsigned i = static_cast<unsigned>(thread_index), in_warp = i % 32;
    if (!by_row) return {static_cast<int>(i / N), static_cast<int>(i % N)};
    const int part_bits = row_bits - bits;
    const unsigned part = i / 32 & ((1u << part_bits) - 1);
    return {static_cast<int>(S * part + in_warp % S), static_cast<int>((i / 32 >> part_bits) * (32 / S) + in_warp / S)};
  }
  SIMT_DEVICE static int staged_at(Element e, int pitch) {
    return e.row / group_rows * group_floats + e.row % group_rows * pitch + e.index;
  }

  template <class S>
  SIMT_DEVICE static void load_general(const Params& p, Floats groups, simt::shared<Index> starts, int left,
                                       int pitch) {
    constexpr int batch = 4;
    const int rows = simt::threads() / G;
    const auto from = p.in.template as<S>();
    SIMT_NO_UNROLL
    for (int begin = simt::thread(); begin < rows * N; begin += batch * simt::threads()) {
      S raw[batch];
      SIMT_UNROLL
      for (int i = 0; i < batch; ++i) {
        const Element e = element_of<32 / sizeof(S)>(begin + i * simt::threads(), p.row_bits, p.in_by_row);
        raw[i] = e.row < left && e.index < p.filled ? from.load(starts.load(e.row) + e.index * p.in_stride) : S{};
      }
      SIMT_UNROLL
      for (int i = 0; i < batch; ++i) {
        const Element e = element_of<32 / sizeof(S)>(begin + i * simt::threads(), p.row_bits, p.in_by_row);
        groups.store(staged_at(e, pitch), simt::to_float(raw[i]));
      }
    }
  }

  template <class S>
  SIMT_DEVICE static void store_general(const Params& p, Floats groups, simt::shared<Index> starts, int left,
                                        int pitch) {
    const int rows = simt::threads() / G;
    const auto to = p.out.template as<S>();
    SIMT_NO_UNROLL
    for (int i = simt::thread(); i < rows * N; i += simt::threads()) {
      const Element e = element_of<32 / sizeof(S)>(i, p.row_bits, p.out_by_row);
      if (e.row >= left || e.index >= p.out_size) continue;
      to.store(starts.load(rows + e.row) + e.index * p.out_stride,
               simt::from_float<S>(groups.load(staged_at(e, pitch))));
    }
    const int beyond = p.out_size - N;
    SIMT_NO_UNROLL
    for (Index i = simt::thread(); i < static_cast<Index>(rows) * beyond; i += simt::threads()) {
      const int row = static_cast<int>(p.out_by_row ? i % rows : i / beyond);
      const Index index = N + (p.out_by_row ? i / rows : i % beyond);
      if (row < left) to.store(starts.load(rows + row) + index * p.out_stride, simt::from_float<S>(0.0f));
    }
  }

  // --- before the FFT: from a staged row to columns ---

  SIMT_DEVICE static void take_type2(Floats x, int g, Number* a) {
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) take_vector(a, i, x.template load_vector<4>(4 * vector_of(i, g)));
  }

  SIMT_DEVICE static void take_type3(Floats x, Floats last, int g, Number* a) {
    const bool first = g == 0;
    const int upper = first ? C / 2 * (1 - A) : g, partner = first ? M / 2 : M - g;
    Number pair[R];  // numbers k and m-k
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const int k = (2 * i < A ? g : upper) + C * i;
      const int l = i == 0 ? partner : M - (2 * i < A ? g : upper) - C * i;
      const float xk = x.load(k), xl = x.load(l), yl = x.load(k + M), yk = x.load(l + M);  // y_j = x_n-j
      const auto w = last.template load_vector<4>(4 * (G * i + g));
      const Number s{half_root * (xl + yl), half_root * (yl - xl)};
      const Number sum{xk + s.re, s.im - yk}, difference{xk - s.re, -yk - s.im};
      const Number even = sum * Number{w[0], -w[1]}, odd = difference * Number{w[2], -w[3]};
      pair[i] = {even.im - odd.im, even.re - odd.re};
      pair[A + i] = {-even.im - odd.im, even.re + odd.re};
      if (i == 0) {
        const Number ends{w[2] * xk, w[3] * yl}, middle = Number{w[0], w[1]} * Number{xl, yk};
        pair[0] = choose(first, {ends.re - ends.im, ends.re + ends.im}, pair[0]);
        pair[A] = choose(first, swapped(middle), pair[A]);
      }
    }
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      a[i] = 2 * i < A ? pair[i] : choose(first, 2 * i == A ? pair[A] : pair[R - i], pair[i]);
      a[A + i] = choose(first, 2 * i < A ? pair[A / 2 + i] : pair[A + 3 * A / 2 - 1 - i], pair[R - 1 - i]);
    }
  }

  SIMT_DEVICE static void take_type4(Floats x, int g, Number* a) {
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const int k = g + C * i;
      const Number one = load_number(x, k), other = load_number(x, M - 1 - k);
      // exp(-i pi i / 2a) here, the column's share with the first twiddles
      const int at = 16 / A * i, mirrored = 16 / A * (A - 1 - i);
      a[i] =
          Number{one.re, other.im} * Number{static_cast<float>(cosine_32(at)), static_cast<float>(-cosine_32(16 - at))};
      a[R - 1 - i] = Number{other.re, one.im} *
                     Number{static_cast<float>(cosine_32(mirrored)), static_cast<float>(-cosine_32(16 - mirrored))};
    }
  }

  // --- the FFT, from columns to pairs ---

  SIMT_DEVICE static void transform(const Params& p, const Place& at, bool staged, Number* a) {
    constexpr int step = exchange_step;
    const int g = at.g;
    const bool mirrored_in = p.type != 3, mirrored_out = p.type != 2;
    const int other_column = mirrored_in ? C - 1 - g : g == 0 ? C / 2 : C - g;
    const Floats first = at.tables + first_table, middle = at.tables + middle_table;
    const Floats x = at.group + 2 * exchange_pitch * at.row;

    fft<A>(a);
    fft<A>(a + A);
    if (staged) sync();  // the staged row has been read
    SIMT_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int column = h == 0 ? g : other_column;
      SIMT_UNROLL
      for (int k = 0; k < A; ++k) {
        if (k > 0 || p.type == 4) a[A * h + k] = a[A * h + k] * load_number(first, C * k + column);
        store_number(x, step * k + column, a[A * h + k]);
      }
    }
    sync();
    if constexpr (Q > 1) {
      const int d = g % B;
      SIMT_UNROLL
      for (int i = 0; i < R / Q; ++i) {
        const Floats from = x + 2 * (step * (g / B + G / B * i) + d);
        SIMT_UNROLL
        for (int k = 0; k < Q; ++k) a[k] = load_number(from, B * k);
        fft<Q>(a);
        SIMT_UNROLL
        for (int k = 0; k < Q; ++k) store_number(from, B * k, k == 0 ? a[k] : a[k] * load_number(middle, B * k + d));
      }
      sync();
    }
    SIMT_UNROLL
    for (int h = 0; h < R / B; ++h) {
      const int k = h == 0 ? g : mirrored_out ? D - 1 - g : g == 0 ? D / 2 : D - g;
      const Floats from = x + 2 * (step * (k % A) + k / A * B);
      SIMT_UNROLL
      for (int t = 0; t < B; ++t) a[B * h + t] = load_number(from, t);
      fft<B>(a + B * h);
    }
  }

  // Numbers k_i = c + D i to a[i], their partners to a[A + i].
  SIMT_DEVICE static void make_pairs(bool mirrored, int g, Number* a) {
    const bool first = g == 0;
    Number b[R];
    SIMT_UNROLL
    for (int i = 0; i < R; ++i) b[i] = a[i];
    if constexpr (two_classes) {
      SIMT_UNROLL
      for (int i = 0; i < A; ++i) a[A + i] = b[R - 1 - i];
      if (mirrored) return;
      SIMT_UNROLL
      for (int i = 0; i < A; ++i) {
        if (2 * i >= A) a[i] = choose(first, b[A / 2 + i], b[i]);
        a[A + i] = choose(first, i == 0 ? b[A / 2] : 2 * i < A ? b[A - i] : b[A + 3 * A / 2 - 1 - i], b[R - 1 - i]);
      }
    } else {
      const int partner = mirrored ? G - 1 - g : (G - g) % G;
      const bool own = first && !mirrored;
      SIMT_UNROLL
      for (int i = 0; i < A; ++i) {
        const Number give = choose(own, b[i == 0 ? A : R - i], b[R - 1 - i]);
        a[A + i] = {simt::shuffle(give.re, partner, G), simt::shuffle(give.im, partner, G)};
      }
    }
  }

  // --- after the FFT: from pairs to a staged row ---

  SIMT_DEVICE static void give_type2(Floats x, Floats last, int g, const Number* a) {
    const bool first = g == 0;
    const int upper = two_classes && first ? D / 2 * (1 - A) : g, partner = first ? M / 2 : M - g;
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const auto w = last.template load_vector<4>(4 * (G * i + g));
      const Number zk = a[i], zl = a[A + i];
      const Number even = Number{zk.re + zl.re, zk.im - zl.im} * Number{w[0], w[1]};
      const Number odd = Number{zk.re - zl.re, zk.im + zl.im} * Number{w[2], w[3]};
      const Number sum = even + odd;
      float yk = even.re - odd.re, ynk = odd.im - even.im;
      float yl = half_root * (sum.re - sum.im), ynl = half_root * (sum.re + sum.im);
      const int k = (2 * i < A ? g : upper) + D * i;
      const int l = i == 0 ? partner : M - (2 * i < A ? g : upper) - D * i;
      if (i == 0) {
        const Number middle = Number{w[0], w[1]} * Number{zl.re, -zl.im};
        yk = first ? w[2] * (zk.re + zk.im) : yk;
        ynl = first ? w[3] * (zk.re - zk.im) : ynl;
        yl = first ? middle.re : yl;
        ynk = first ? -middle.im : ynk;
      }
      x.store(k, yk);
      x.store(k + M, ynl);
      x.store(l, yl);
      x.store(l + M, ynk);
    }
  }

  SIMT_DEVICE static void give_type3(Floats x, int g, const Number* a) {
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const Vector v = give_vector(a, i, g);
      x.template store_vector<4>(4 * v.index, v.value);
    }
  }

  SIMT_DEVICE static void give_type4(Floats x, Floats last, int g, const Number* a) {
    SIMT_UNROLL
    for (int i = 0; i < A; ++i) {
      const auto w = last.template load_vector<4>(4 * (G * i + g));
      const int k = g + D * i;
      const Number one = a[i] * Number{w[0], w[1]}, other = a[A + i] * Number{w[2], w[3]};
      store_number(x, k, {one.re, -other.im});
      store_number(x, M - 1 - k, {other.re, -one.im});
    }
  }

  SIMT_DEVICE static void run(const Params& p) {
    const int threads = simt::threads();
    const Floats tables = simt::shared_array<float>(0, table_floats);
    const int rows = threads / G, floats = group_floats * (threads / group_lanes);
    const Floats groups = simt::shared_array<float>(groups_at, floats);
    const auto starts = simt::shared_array<Index>(starts_at, 2 * rows);
    const Floats last = tables + last_table;
    const int in_unit = p.type == 2 ? 4 : p.type == 3 ? 1 : 2, out_unit = p.type == 2 ? 1 : p.type == 3 ? 4 : 2;
    const int in_pitch = p.in_by_row ? pitch_across : N + in_unit * G % 32;
    const int out_pitch = p.out_by_row ? pitch_across : N + out_unit * G % 32;
    const bool general = p.load == Path::general || p.store == Path::general;

    fill_tables(p, tables);
    simt::barrier();
    SIMT_NO_UNROLL
    for (Index tile = simt::block() * rows; tile < p.batch.rows; tile += simt::blocks() * rows) {
      const int left = static_cast<int>(p.batch.rows - tile < rows ? p.batch.rows - tile : rows);
      const int thread = simt::opaque(simt::thread());
      const unsigned lane = static_cast<unsigned>(thread) % group_lanes;
      const int group = static_cast<int>(static_cast<unsigned>(thread) / group_lanes);
      Place at;
      at.g = static_cast<int>(lane % G);
      at.in_group = static_cast<int>(lane);
      at.row = static_cast<int>(lane / G);
      at.tables = tables;
      at.group = groups + group_floats * group;
      at.first = tile + group * group_rows;
      at.left = left - group * group_rows;
      Number a[R];

      if (general) {
        if (thread < left) {
          const Offsets o = offsets_of(p.batch, tile + thread);
          starts.store(thread, o.in);
          starts.store(rows + thread, o.out);
        }
        simt::barrier();
      }
      if (p.load == Path::vectors) {
        with_dtype<float>(p.from, [&](auto s) { load_vectors<decltype(s)>(p, at, a); });
      } else {
        if (p.load == Path::general) {
          with_dtype<float>(p.from, [&](auto s) { load_general<decltype(s)>(p, groups, starts, left, in_pitch); });
          simt::barrier();
        } else {
          with_dtype<float>(p.from, [&](auto s) {
            if (G == 2 && p.type == 3) {
              load_staged<decltype(s), G == 2 ? 2 : 4>(p, at, in_pitch);
            } else {
              load_staged<decltype(s), 4>(p, at, in_pitch);
            }
          });
          sync();
        }
        const Floats x = at.group + in_pitch * at.row;
        if (p.type == 2) {
          take_type2(x, at.g, a);
        } else if (p.type == 3) {
          take_type3(x, last, at.g, a);
        } else {
          take_type4(x, at.g, a);
        }
      }

      transform(p, at, p.load != Path::vectors, a);
      make_pairs(p.type != 2, at.g, a);
      if (p.type == 3) {
        SIMT_UNROLL
        for (int i = 0; i < R; ++i) a[i] = swapped(a[i]);
      }

      if (p.store == Path::vectors) {
        with_dtype<float>(p.to, [&](auto s) { store_vectors<decltype(s)>(p, at, a); });
      } else {
        sync();  // the exchange has been read
        const Floats x = at.group + out_pitch * at.row;
        if (p.type == 2) {
          give_type2(x, last, at.g, a);
        } else if (p.type == 3) {
          give_type3(x, at.g, a);
        } else {
          give_type4(x, last, at.g, a);
        }
        if (p.store == Path::general) {
          simt::barrier();
          with_dtype<float>(p.to, [&](auto s) { store_general<decltype(s)>(p, groups, starts, left, out_pitch); });
        } else {
          sync();
          with_dtype<float>(p.to, [&](auto s) {
            if (G == 2 && p.type == 2) {
              store_staged<decltype(s), G == 2 ? 2 : 4>(p, at, out_pitch);
            } else {
              store_staged<decltype(s), 4>(p, at, out_pitch);
            }
          });
        }
      }
      if (general) {
        simt::barrier();
      } else {
        sync();
      }
    }
  }
};

// Vectors need aligned rows whose elements follow each other, with the same distance from row to row.
inline bool plain_rows(const Step& step, bool input, const void* base) {
  const Axis& axis = step.axis[0];
  const Index bytes = 4 * bytes_of(input ? step.from_dtype : step.to_dtype);
  if ((input ? axis.in_stride : axis.out_stride) != 1 || (input ? axis.filled : axis.out_size) != axis.n) return false;
  if (step.batch.size() > 1 || reinterpret_cast<std::uintptr_t>(base) % bytes != 0) return false;
  return step.batch.empty() || (input ? step.batch[0].in_stride : step.batch[0].out_stride) % 4 == 0;
}

template <int N, class Queue>
void enqueue_power_of_two_length(const Step& step, const StepPointers& pointers, Queue& queue) {
  using Kernel = PowerOfTwo<N>;
  using Path = typename Kernel::Path;
  const Axis& axis = step.axis[0];
  typename Kernel::Params p{};
  p.in = input_of(step, pointers, queue);
  p.out = output_of(step, pointers, queue);
  p.from = step.from_dtype;
  p.to = step.to_dtype;
  p.type = step.type;
  // lanes that hold vectors of a row side by side must make up whole sectors
  const auto sectors = [&](Dtype dtype) { return Kernel::G * 4 * bytes_of(dtype) >= 32; };
  p.load = !plain_rows(step, true, pointers.in)         ? Path::general
           : step.type == 2 && sectors(step.from_dtype) ? Path::vectors
                                                        : Path::staged;
  p.store = !plain_rows(step, false, pointers.out)     ? Path::general
            : step.type == 3 && sectors(step.to_dtype) ? Path::vectors
                                                       : Path::staged;
  p.in_stride = axis.in_stride;
  p.out_stride = axis.out_stride;
  p.filled = static_cast<int>(axis.filled);
  p.out_size = static_cast<int>(axis.out_size);
  while ((1 << p.row_bits) < step.rows_per_block) ++p.row_bits;
  p.in_by_row = step.load == Tiling::by_row;
  p.out_by_row = step.store == Tiling::by_row;
  p.scale = axis.scale;
  p.in_end = axis.in_end;
  p.out_end = axis.out_end;
  p.batch = batch_of(step);
  queue.template launch<Kernel>({step.blocks, step.threads, step.shared_bytes}, p);
}

template <class Queue>
void enqueue_power_of_two(const Step& step, const StepPointers& pointers, Queue& queue) {
  switch (step.axis[0].n) {
    case 32: return enqueue_power_of_two_length<32>(step, pointers, queue);
    case 64: return enqueue_power_of_two_length<64>(step, pointers, queue);
    case 128: return enqueue_power_of_two_length<128>(step, pointers, queue);
    case 256: return enqueue_power_of_two_length<256>(step, pointers, queue);
    case 512: return enqueue_power_of_two_length<512>(step, pointers, queue);
    case 1024: return enqueue_power_of_two_length<1024>(step, pointers, queue);
    case 2048: return enqueue_power_of_two_length<2048>(step, pointers, queue);
    case 4096: return enqueue_power_of_two_length<4096>(step, pointers, queue);
    case 8192: return enqueue_power_of_two_length<8192>(step, pointers, queue);
    default: throw std::logic_error("dct: no power-of-two kernel of length " + std::to_string(step.axis[0].n));
  }
}

}  // namespace freqrank::dct::device
