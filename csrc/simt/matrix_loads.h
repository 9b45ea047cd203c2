#pragma once
// Fragments from shared memory by ldmatrix, for any layout whose 16-byte pieces are contiguous and aligned.
// `address(row, col)` says where in `from` the piece lies that starts with element (row, col) of the fragment.

namespace freqrank::simt {

// Pieces along the rows: A stored row by row, B stored row (depth) by row. B needs 2-byte elements.
template <class E, Role R, class Address>
SIMT_DEVICE void load_matrix_rows(Fragment<E, R>& fragment, shared<E> from, Address address SIMT_CALLER) {
  static_assert(R != Role::accumulator && sizeof(E) <= 4 && (R == Role::a || sizeof(E) == 2));
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  const int matrix = lane() / 8, r = lane() % 8;
  if constexpr (R == Role::a) {
    const auto registers = load_matrices<4, false>(from, address(r + matrix % 2 * 8, matrix / 2 * piece) SIMT_PASS);
    SIMT_UNROLL
    for (int j = 0; j < 4; ++j) fragment.set_register(j, registers[j] SIMT_PASS);
  } else {
    const auto registers = load_matrices<2, true>(from, address(r + matrix % 2 * 8, 0) SIMT_PASS);
    SIMT_UNROLL
    for (int j = 0; j < 2; ++j) fragment.set_register(j, registers[j] SIMT_PASS);
  }
}

// Pieces along the columns: B stored column by column, A stored depth by depth. A needs 2-byte elements.
template <class E, Role R, class Address>
SIMT_DEVICE void load_matrix_columns(Fragment<E, R>& fragment, shared<E> from, Address address SIMT_CALLER) {
  static_assert(R != Role::accumulator && sizeof(E) <= 4 && (R == Role::b || sizeof(E) == 2));
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  const int matrix = lane() / 8, r = lane() % 8;
  if constexpr (R == Role::a) {
    const auto registers = load_matrices<4, true>(from, address(matrix % 2 * 8, r + matrix / 2 * 8) SIMT_PASS);
    SIMT_UNROLL
    for (int j = 0; j < 4; ++j) fragment.set_register(j, registers[j] SIMT_PASS);
  } else {
    const auto registers = load_matrices<2, false>(from, address(matrix % 2 * piece, r) SIMT_PASS);
    SIMT_UNROLL
    for (int j = 0; j < 2; ++j) fragment.set_register(j, registers[j] SIMT_PASS);
  }
}

// Two fragments of B side by side (16 columns) by one instruction.
template <class E, class Address>
SIMT_DEVICE void load_matrix_rows(Fragment<E, Role::b>& left, Fragment<E, Role::b>& right, shared<E> from,
                                  Address address SIMT_CALLER) {
  static_assert(sizeof(E) == 2);
  const int matrix = lane() / 8, r = lane() % 8;
  const auto registers = load_matrices<4, true>(from, address(r + matrix % 2 * 8, matrix / 2 * 8) SIMT_PASS);
  SIMT_UNROLL
  for (int j = 0; j < 2; ++j) {
    left.set_register(j, registers[j] SIMT_PASS);
    right.set_register(j, registers[2 + j] SIMT_PASS);
  }
}
template <class E, class Address>
SIMT_DEVICE void load_matrix_columns(Fragment<E, Role::b>& left, Fragment<E, Role::b>& right, shared<E> from,
                                     Address address SIMT_CALLER) {
  static_assert(sizeof(E) <= 4);
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  const int matrix = lane() / 8, r = lane() % 8;
  const auto registers = load_matrices<4, false>(from, address(matrix % 2 * piece, r + matrix / 2 * 8) SIMT_PASS);
  SIMT_UNROLL
  for (int j = 0; j < 2; ++j) {
    left.set_register(j, registers[j] SIMT_PASS);
    right.set_register(j, registers[2 + j] SIMT_PASS);
  }
}

}  // namespace freqrank::simt
