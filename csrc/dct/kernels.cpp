// Compiled once for each instruction set. V is a vector that holds one row in each lane, or a scalar for one row at a
// time; T the type of its lanes. Real and imaginary parts lie in arrays of their own.
#include "dct/kernels.h"

#include <cstring>

#include "common/half.h"
#include "dct/codelets.h"

namespace freqrank::dct::FREQRANK_ISA {

namespace {

#if FREQRANK_ISA_avx512
#define FREQRANK_VECTOR_BYTES 64
#elif FREQRANK_ISA_avx2
#define FREQRANK_VECTOR_BYTES 32
#else
#define FREQRANK_VECTOR_BYTES 16
#endif
typedef float Floats __attribute__((vector_size(FREQRANK_VECTOR_BYTES), may_alias));
typedef double Doubles __attribute__((vector_size(FREQRANK_VECTOR_BYTES), may_alias));

using Index = std::int64_t;

template <class V, class T>
FREQRANK_INLINE Complex<V> multiply(const Complex<V>& a, T re, T im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// --- complex FFT --------------------------------------------------------------------------------------------------

// One butterfly of a Stockham stage (decimation in frequency, self-sorting).
template <int R, bool Twiddle, class V, class T>
FREQRANK_INLINE void step(const V* xr, const V* xi, Index x_step, V* yr, V* yi, Index y_step, const T* twiddles,
                          Index twiddle_step) {
  Complex<V> a[R];
  FREQRANK_UNROLL
  for (int t = 0; t < R; ++t) a[t] = {xr[t * x_step], xi[t * x_step]};
  butterfly<R>(a);
  yr[0] = a[0].re;
  yi[0] = a[0].im;
  FREQRANK_UNROLL
  for (int j = 1; j < R; ++j) {
    if constexpr (Twiddle) {
      a[j] = multiply(a[j], twiddles[2 * (j - 1) * twiddle_step], twiddles[(2 * j - 1) * twiddle_step]);
    }
    yr[j * y_step] = a[j].re;
    yi[j * y_step] = a[j].im;
  }
}

// A stage of radix R on `s` interleaved transforms of length R m.
template <int R, class V, class T>
void stage(Index m, Index s, const V* __restrict xr, const V* __restrict xi, V* __restrict yr, V* __restrict yi,
           const T* __restrict twiddles) {
  if (m == 1) {
    for (Index q = 0; q < s; ++q) step<R, false>(xr + q, xi + q, s, yr + q, yi + q, s, twiddles, 1);
  } else if (s == 1) {
    for (Index p = 0; p < m; ++p) {
      step<R, true>(xr + p, xi + p, m, yr + R * p, yi + R * p, 1, twiddles + p, m);
    }
  } else {
    for (Index p = 0; p < m; ++p) {
      const V *ar = xr + s * p, *ai = xi + s * p;
      V *br = yr + s * R * p, *bi = yi + s * R * p;
      for (Index q = 0; q < s; ++q) step<R, true>(ar + q, ai + q, s * m, br + q, bi + q, s, twiddles + p, m);
    }
  }
}

template <class V>
struct Split {  // a complex array
  V *re, *im;
};

template <class V>
FREQRANK_INLINE void exchange(V& a, V& b) {
  const V c = a;
  a = b;
  b = c;
}

// FFT of length fft.inner. The result is in x; x and y may change places.
template <class V, class T>
void mixed_radix(const Fft& fft, const T* table, Split<V>& x, Split<V>& y) {
  Index n = fft.inner, s = 1;
  for (int i = 0; i < fft.stages; ++i) {
    const int radix = fft.radix[i];
    const Index m = n / radix;
    const T* twiddles = table + fft.twiddles[i];
    switch (radix) {
      case 2: stage<2>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      case 3: stage<3>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      case 4: stage<4>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      case 5: stage<5>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      case 7: stage<7>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      case 11: stage<11>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
      default: stage<13>(m, s, x.re, x.im, y.re, y.im, twiddles); break;
    }
    exchange(x, y);
    n = m;
    s *= radix;
  }
}

// FFT of length fft.n, the arrays of length fft.inner.
template <class V, class T>
void forward(const Fft& fft, const T* table, Split<V>& x, Split<V>& y) {
  if (!fft.bluestein()) {
    mixed_radix(fft, table, x, y);
    return;
  }
  const T *chirp = table + fft.chirp, *spectrum = table + fft.spectrum;
  const auto modulate = [&] {
    for (Index k = 0; k < fft.n; ++k) {
      const Complex<V> a = multiply(Complex<V>{x.re[k], x.im[k]}, chirp[k], chirp[fft.n + k]);
      x.re[k] = a.re;
      x.im[k] = a.im;
    }
  };
  modulate();
  for (Index k = fft.n; k < fft.inner; ++k) x.re[k] = x.im[k] = V{};
  mixed_radix(fft, table, x, y);
  for (Index k = 0; k < fft.inner; ++k) {
    const Complex<V> a = multiply(Complex<V>{x.re[k], x.im[k]}, spectrum[k], spectrum[fft.inner + k]);
    x.re[k] = a.re;
    x.im[k] = a.im;
  }
  // the inverse is the forward transform with real and imaginary parts exchanged
  exchange(x.re, x.im);
  exchange(y.re, y.im);
  mixed_radix(fft, table, x, y);
  exchange(x.re, x.im);
  exchange(y.re, y.im);
  modulate();
}

template <class V, class T>
void backward(const Fft& fft, const T* table, Split<V>& x, Split<V>& y) {
  exchange(x.re, x.im);
  exchange(y.re, y.im);
  forward(fft, table, x, y);
  exchange(x.re, x.im);
  exchange(y.re, y.im);
}

// --- cosine transforms of one row, in place -----------------------------------------------------------------------

// Type I: the symmetric extension of length 2L, L = n - 1, as L complex numbers z_j = s_2j + i s_2j+1; the real part of
// its spectrum.
template <class V, class T>
void type1(const Row& row, const T* table, V* x, Split<V> z, Split<V> other) {
  const Index length = row.n - 1;
  const T *cosine = table + row.rotation, *sine = cosine + length / 2 + 1;
  const T half = static_cast<T>(0.5 * row.scale), scale = static_cast<T>(row.scale);
  x[0] = x[0] + x[0];
  x[length] = x[length] + x[length];
  for (Index j = 0; j < length; ++j) {
    const Index a = 2 * j, b = 2 * j + 1;
    z.re[j] = x[a <= length ? a : 2 * length - a];
    z.im[j] = x[b <= length ? b : 2 * length - b];
  }
  forward(row.fft, table, z, other);
  x[0] = (z.re[0] + z.im[0]) * scale;
  x[length] = (z.re[0] - z.im[0]) * scale;
  for (Index k = 1; k <= length / 2; ++k) {
    const Index l = length - k;
    const V even = (z.re[k] + z.re[l]) * half;
    const V odd = (z.im[k] + z.im[l]) * cosine[k] - (z.re[k] - z.re[l]) * sine[k];
    x[l] = even - odd;
    x[k] = even + odd;
  }
}

// Types II and III permute v_i = x_2i, v_n-1-i = x_2i+1 so that a real DFT of v is what remains.
FREQRANK_INLINE Index permuted(Index i, Index n) { return 2 * i < n ? 2 * i : 2 * n - 1 - 2 * i; }

template <class V, class T>
void type2(const Row& row, const T* table, V* x, Split<V> z, Split<V> other) {
  const Index n = row.n;
  const T *cosine = table + row.post, *sine = cosine + n / 2 + 1;
  if (!row.even) {
    for (Index j = 0; j < n; ++j) {
      z.re[j] = x[permuted(j, n)];
      z.im[j] = V{};
    }
    forward(row.fft, table, z, other);
    x[0] = z.re[0] * cosine[0];
    for (Index k = 1; k <= n / 2; ++k) {
      x[k] = z.re[k] * cosine[k] + z.im[k] * sine[k];
      x[n - k] = z.re[k] * sine[k] - z.im[k] * cosine[k];
    }
    return;
  }
  const Index length = n / 2;
  const T *turn_cos = table + row.rotation, *turn_sin = turn_cos + length / 2 + 1;
  for (Index j = 0; j < length; ++j) {
    z.re[j] = x[permuted(2 * j, n)];
    z.im[j] = x[permuted(2 * j + 1, n)];
  }
  forward(row.fft, table, z, other);
  const T twice = static_cast<T>(2.0 * row.scale), root = static_cast<T>(1.41421356237309504880 * row.scale);
  x[0] = (z.re[0] + z.im[0]) * twice;
  x[length] = (z.re[0] - z.im[0]) * root;
  for (Index k = 1; k <= length / 2; ++k) {
    const Index l = length - k;
    const Complex<V> even{z.re[k] + z.re[l], z.im[k] - z.im[l]};
    const Complex<V> difference{z.re[k] - z.re[l], z.im[k] + z.im[l]};
    const Complex<V> odd = multiply(difference, -turn_sin[k], -turn_cos[k]);
    const Complex<V> a = even + odd, b{even.re - odd.re, odd.im - even.im};  // twice V_k and V_l
    x[l] = b.re * cosine[l] + b.im * sine[l];
    x[n - l] = b.re * sine[l] - b.im * cosine[l];
    x[k] = a.re * cosine[k] + a.im * sine[k];
    x[n - k] = a.re * sine[k] - a.im * cosine[k];
  }
}

template <class V, class T>
void type3(const Row& row, const T* table, V* x, Split<V> z, Split<V> other) {
  const Index n = row.n;
  const T *cosine = table + row.post, *sine = cosine + n / 2 + 1;
  const T twice = static_cast<T>(2.0 * row.scale), root = static_cast<T>(1.41421356237309504880 * row.scale);
  // V_k = exp(i pi k / 2n) (x_k - i x_n-k), whose inverse real DFT is v
  const auto spectrum = [&](Index k) {
    const V a = x[k], b = x[n - k];
    return Complex<V>{a * cosine[k] + b * sine[k], a * sine[k] - b * cosine[k]};
  };
  if (!row.even) {
    z.re[0] = x[0] * twice;
    z.im[0] = V{};
    for (Index k = 1; k <= n / 2; ++k) {
      const Complex<V> a = spectrum(k);
      z.re[k] = z.re[n - k] = a.re;
      z.im[k] = a.im;
      z.im[n - k] = -a.im;
    }
    backward(row.fft, table, z, other);
    for (Index j = 0; j < n; ++j) x[permuted(j, n)] = z.re[j];
    return;
  }
  const Index length = n / 2;
  const T *turn_cos = table + row.rotation, *turn_sin = turn_cos + length / 2 + 1;
  const V first = x[0] * twice, middle = x[length] * root;
  z.re[0] = first + middle;
  z.im[0] = first - middle;
  for (Index k = 1; k <= length / 2; ++k) {
    const Index l = length - k;
    const Complex<V> a = spectrum(k), b = spectrum(l);
    const Complex<V> even{a.re + b.re, a.im - b.im};
    const Complex<V> odd = multiply(Complex<V>{a.re - b.re, a.im + b.im}, -turn_sin[k], turn_cos[k]);
    z.re[l] = even.re - odd.re;
    z.im[l] = odd.im - even.im;
    z.re[k] = even.re + odd.re;
    z.im[k] = even.im + odd.im;
  }
  backward(row.fft, table, z, other);
  for (Index j = 0; j < length; ++j) {
    x[permuted(2 * j, n)] = z.re[j];
    x[permuted(2 * j + 1, n)] = z.im[j];
  }
}

// Type IV of an odd length is a real DFT of that length up to order and signs: the odd residues a = 2k + 1 modulo 8n
// have four images under a -> -a, 4n - a, 4n + a, over which the cosine only changes its sign, one of them 1 modulo 8.
// This one, a = 8 i + 1, belongs to position a / 8 = i + 1/8 modulo n of the DFT's input, and to a modulo n of its
// output.
struct Image {
  Index index;
  bool negative;
};

FREQRANK_INLINE Image image(Index i, Index n) {
  const Index a = 8 * i + 1;
  if (a < 2 * n) return {(a - 1) / 2, false};
  if (a < 4 * n) return {(4 * n - a - 1) / 2, true};
  if (a < 6 * n) return {(a - 4 * n - 1) / 2, true};
  return {(8 * n - a - 1) / 2, false};
}

template <class V, class T>
void type4(const Row& row, const T* table, V* x, Split<V> z, Split<V> other) {
  const Index n = row.n;
  if (row.even) {
    const Index length = n / 2;
    const T *pre_cos = table + row.pre, *pre_sin = pre_cos + length;
    const T *post_cos = table + row.post, *post_sin = post_cos + length;
    for (Index j = 0; j < length; ++j) {
      const Complex<V> a = multiply(Complex<V>{x[2 * j], x[n - 1 - 2 * j]}, pre_cos[j], -pre_sin[j]);
      z.re[j] = a.re;
      z.im[j] = a.im;
    }
    forward(row.fft, table, z, other);
    for (Index k = 0; k < length; ++k) {
      x[2 * k] = z.re[k] * post_cos[k] + z.im[k] * post_sin[k];
      x[n - 1 - 2 * k] = z.re[k] * post_sin[k] - z.im[k] * post_cos[k];
    }
    return;
  }
  Index eighth = 1;  // becomes 1/8 modulo n
  while (eighth % 8 != 0) eighth += n;
  Index position = eighth / 8 % n;
  for (Index i = 0; i < n; ++i) {
    const Image from = image(i, n);
    z.re[position] = from.negative ? -x[from.index] : x[from.index];
    z.im[position] = V{};
    if (++position == n) position = 0;
  }
  forward(row.fft, table, z, other);
  const T c = table[row.post], s = table[row.post + 1];
  position = 1 % n;
  for (Index i = 0; i < n; ++i) {
    const Image to = image(i, n);
    const V value = z.re[position] * c + z.im[position] * s;
    x[to.index] = to.negative ? -value : value;
    position = (position + 8) % n;
  }
}

// --- rows in memory ------------------------------------------------------------------------------------------------

// The rows of one group: where lane l starts, how many lanes hold a row.
template <int W>
struct Lanes {
  Index in[W] = {}, out[W] = {};
  int count = 0;
  bool in_adjacent = false, out_adjacent = false;  // all lanes there, element by element beside each other
};

// Elements of a row that are moved before the next lane's turn: whole cache lines, written to a corner of x that
// stays in the first-level cache.
constexpr Index kBlock = 16;

template <class S, int W, class T>
void load(const Work& work, const Lanes<W>& lanes, T* x) {
  const S* base = static_cast<const S*>(work.in);
  const Index stride = work.pass->in_stride, filled = work.pass->filled, n = work.row->n;
  if (filled == 0) {
  } else if (W > 1 && lanes.in_adjacent) {
    for (Index i = 0; i < filled; ++i) {
      const S* from = base + lanes.in[0] + i * stride;
      for (int l = 0; l < W; ++l) x[i * W + l] = static_cast<T>(to_float(from[l]));
    }
  } else if (W == 1) {
    const S* from = base + lanes.in[0];
    if (stride == 1) {
      for (Index i = 0; i < filled; ++i) x[i] = static_cast<T>(to_float(from[i]));
    } else {
      for (Index i = 0; i < filled; ++i) x[i] = static_cast<T>(to_float(from[i * stride]));
    }
  } else {
    for (Index start = 0; start < filled; start += kBlock) {
      const Index end = start + kBlock < filled ? start + kBlock : filled;
      for (int l = 0; l < W; ++l) {
        if (l < lanes.count) {
          const S* from = base + lanes.in[l];
          for (Index i = start; i < end; ++i) x[i * W + l] = static_cast<T>(to_float(from[i * stride]));
        } else {
          for (Index i = start; i < end; ++i) x[i * W + l] = T(0);
        }
      }
    }
  }
  for (Index i = filled * W; i < n * W; ++i) x[i] = T(0);
}

template <class S, class T>
FREQRANK_INLINE S narrow(T x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return from_float<S>(x);
  }
}

template <class S, int W, class T>
void store(const Work& work, const Lanes<W>& lanes, const T* x) {
  S* base = static_cast<S*>(work.out);
  const Index stride = work.pass->out_stride, size = work.pass->out_size, n = work.row->n;
  const Index filled = size < n ? size : n;
  if (W > 1 && lanes.out_adjacent) {
    for (Index i = 0; i < filled; ++i) {
      S* to = base + lanes.out[0] + i * stride;
      for (int l = 0; l < W; ++l) to[l] = narrow<S>(x[i * W + l]);
    }
  } else if (W == 1 && stride == 1) {
    S* to = base + lanes.out[0];
    for (Index i = 0; i < filled; ++i) to[i] = narrow<S>(x[i]);
  } else {
    for (Index start = 0; start < filled; start += kBlock) {
      const Index end = start + kBlock < filled ? start + kBlock : filled;
      for (int l = 0; l < lanes.count; ++l) {
        S* to = base + lanes.out[l];
        for (Index i = start; i < end; ++i) to[i * stride] = narrow<S>(x[i * W + l]);
      }
    }
  }
  for (int l = 0; l < lanes.count; ++l) {
    S* to = base + lanes.out[l];
    for (Index i = filled; i < size; ++i) to[i * stride] = narrow<S>(T(0));
  }
}

// Steps through the rows of a pass in order.
class Odometer {
 public:
  Odometer(const Pass& pass, Index row) : batch_(pass.batch.data()), dims_(static_cast<int>(pass.batch.size())) {
    for (int d = dims_ - 1; d >= 0; --d) {
      index_[d] = row % batch_[d].size;
      row /= batch_[d].size;
      in += index_[d] * batch_[d].in_stride;
      out += index_[d] * batch_[d].out_stride;
    }
  }

  void next() {
    for (int d = dims_ - 1; d >= 0; --d) {
      in += batch_[d].in_stride;
      out += batch_[d].out_stride;
      if (++index_[d] < batch_[d].size) return;
      in -= batch_[d].size * batch_[d].in_stride;
      out -= batch_[d].size * batch_[d].out_stride;
      index_[d] = 0;
    }
  }

  Index in = 0, out = 0;

 private:
  const BatchDim* batch_;
  int dims_;
  Index index_[64];
};

template <class V, class T>
void run_rows(const Work& work, Index begin, Index end, void* scratch) {
  constexpr int W = sizeof(V) / sizeof(T);
  const Pass& pass = *work.pass;
  const Row& row = *work.row;
  const T* table = static_cast<const T*>(work.table);
  V* x = static_cast<V*>(scratch);
  T* flat = static_cast<T*>(scratch);
  const Index inner = row.fft.inner;
  const Split<V> z{x + row.n, x + row.n + inner}, other{x + row.n + 2 * inner, x + row.n + 3 * inner};
  const T in_end = static_cast<T>(pass.in_end), out_end = static_cast<T>(pass.out_end);
  const bool both_ends = row.type == 1;

  Odometer at(pass, begin * W);
  for (Index group = begin; group < end; ++group) {
    Lanes<W> lanes;
    const Index left = pass.rows - group * W;
    lanes.count = left < W ? static_cast<int>(left) : W;
    lanes.in_adjacent = lanes.out_adjacent = lanes.count == W;
    for (int l = 0; l < lanes.count; ++l) {
      lanes.in[l] = at.in;
      lanes.out[l] = at.out;
      lanes.in_adjacent &= at.in == lanes.in[0] + l;
      lanes.out_adjacent &= at.out == lanes.out[0] + l;
      at.next();
    }
    if constexpr (sizeof(T) == 8) {
      load<double, W>(work, lanes, flat);
    } else {
      switch (pass.from_dtype) {
        case Dtype::float16: load<float16, W>(work, lanes, flat); break;
        case Dtype::bfloat16: load<bfloat16, W>(work, lanes, flat); break;
        default: load<float, W>(work, lanes, flat);
      }
    }
    if (in_end != T(1)) {
      x[0] = x[0] * in_end;
      if (both_ends) x[row.n - 1] = x[row.n - 1] * in_end;
    }
    switch (row.type) {
      case 1: type1(row, table, x, z, other); break;
      case 2: type2(row, table, x, z, other); break;
      case 3: type3(row, table, x, z, other); break;
      default: type4(row, table, x, z, other);
    }
    if (out_end != T(1)) {
      x[0] = x[0] * out_end;
      if (both_ends) x[row.n - 1] = x[row.n - 1] * out_end;
    }
    if constexpr (sizeof(T) == 8) {
      store<double, W>(work, lanes, flat);
    } else {
      switch (pass.to_dtype) {
        case Dtype::float16: store<float16, W>(work, lanes, flat); break;
        case Dtype::bfloat16: store<bfloat16, W>(work, lanes, flat); break;
        default: store<float, W>(work, lanes, flat);
      }
    }
  }
}

}  // namespace

void run_groups(const Work& work, std::int64_t begin, std::int64_t end, void* scratch) {
  if (begin >= end) return;
  const bool single = work.pass->lanes == 1;
  if (work.row->wide) {
    single ? run_rows<double, double>(work, begin, end, scratch) : run_rows<Doubles, double>(work, begin, end, scratch);
  } else {
    single ? run_rows<float, float>(work, begin, end, scratch) : run_rows<Floats, float>(work, begin, end, scratch);
  }
}

void fft_double(const Fft& fft, const double* table, double* re, double* im, double* other_re, double* other_im) {
  Split<double> x{re, im}, y{other_re, other_im};
  mixed_radix(fft, table, x, y);
  if (x.re == re) return;
  std::memcpy(re, x.re, sizeof(double) * static_cast<std::size_t>(fft.inner));
  std::memcpy(im, x.im, sizeof(double) * static_cast<std::size_t>(fft.inner));
}

}  // namespace freqrank::dct::FREQRANK_ISA
