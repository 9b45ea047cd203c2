#pragma once
// How the power-of-two kernel cuts a row, for the plan and the kernel alike. Host code and constants only.

namespace freqrank::dct::device {

// A row of length n is a complex FFT of length m = a q b = n / 2, held by `lanes` lanes with 2a complex numbers each.
//   j = columns i + c   first stage, radix a over i: a lane has two columns c, `columns` = m / a of them
//   middle stage        radix q, if q > 1
//   k = classes t + c   last stage, radix b over t: a lane has two classes c (b = a) or one (b = 2a)
struct PowerOfTwoShape {
  int n = 0, a = 0, q = 0, b = 0;

  constexpr bool valid() const { return n != 0; }
  constexpr int m() const { return n / 2; }
  constexpr int lanes() const { return m() / (2 * a); }
  constexpr int columns() const { return m() / a; }
  constexpr int classes() const { return m() / b; }
  // Rows that synchronise together: those of a warp, or one that is spread over several warps.
  constexpr int group_lanes() const { return lanes() > 32 ? lanes() : 32; }
  constexpr int group_rows() const { return lanes() > 32 ? 1 : 32 / lanes(); }

  // The exchange between stages: [a][columns + 1] complex numbers, odd so that a column and a row of it both meet all
  // banks; rows of a group `lanes` 8-byte banks apart.
  constexpr int exchange_step() const { return columns() + 1; }
  constexpr int exchange_pitch() const {
    const int size = a * exchange_step();
    return lanes() >= 16 ? size : size + ((lanes() - size % 16) % (2 * lanes()) + 2 * lanes()) % (2 * lanes());
  }
  // A row of real numbers that lanes reach in units of 1, 2 or 4: rows of a group `lanes` units apart.
  constexpr int stage_pitch(int unit) const { return n + unit * lanes() % 32; }
  // Where neighbouring threads take neighbouring rows.
  constexpr int pitch_across() const { return n + 4; }
  constexpr int group_floats() const {
    int floats = 2 * exchange_pitch();
    for (int unit = 1; unit <= 4; unit *= 2) floats = stage_pitch(unit) > floats ? stage_pitch(unit) : floats;
    floats = pitch_across() > floats ? pitch_across() : floats;
    // Row r of a block, if each has pitch_across(), starts at bank 4 r, whatever its group.
    return (floats * group_rows() + 31) / 32 * 32 + 4 * group_rows() % 32;
  }

  // Tables in shared memory, in floats: first [a][columns] complex, middle [q][b] complex, last [a][lanes] of two.
  constexpr int first_table() const { return 0; }
  constexpr int middle_table() const { return n; }
  constexpr int last_table() const { return middle_table() + (q > 1 ? 2 * q * b : 0); }
  constexpr int table_floats() const { return last_table() + n; }

  static constexpr int max_threads = 256;
  // Shared memory of a block: tables, where each row starts (for rows that are not plain), groups.
  constexpr int rows(int threads) const { return threads / lanes(); }
  constexpr int starts_at() const { return 4 * table_floats(); }
  constexpr int groups_at() const { return starts_at() + (16 * rows(max_threads) + 127) / 128 * 128; }
  constexpr int shared_bytes(int threads) const { return groups_at() + 4 * group_floats() * (threads / group_lanes()); }

  // Blocks of max_threads that an SM's registers must hold: 128, 80 or 64 registers a thread.
  constexpr int min_blocks() const { return a == 16 ? 2 : a == 8 ? 3 : 4; }
};

constexpr PowerOfTwoShape power_of_two_shape(long long n) {
  switch (n) {
    case 32: return {32, 4, 1, 4};
    case 64: return {64, 4, 1, 8};
    case 128: return {128, 8, 1, 8};
    case 256: return {256, 8, 1, 16};
    case 512: return {512, 16, 1, 16};
    case 1024: return {1024, 16, 1, 32};
    case 2048: return {2048, 16, 4, 16};
    case 4096: return {4096, 16, 8, 16};
    case 8192: return {8192, 16, 16, 16};
    default: return {};
  }
}

}  // namespace freqrank::dct::device
