// Products of bfloat16 rows with packed weights by AMX: 16 rows of x and 16 columns of a panel are a tile each, and an
// instruction adds 32 products to each of their 256 sums, in one order. A row's bits do not depend on its company: one
// row alone goes through the same instructions, with tiles of one row.
#pragma once

#include <initializer_list>

#include "lanes.h"

namespace ldalign::cpu::LDALIGN_ISA {

// Tiles 0 to 3: the sums of two times 16 rows with a panel's two halves; 4 and 5: the rows; 6 and 7: the halves.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  TileShapes(int64_t first, int64_t second) {
    for (int tile : {0, 1, 4}) rows[tile] = static_cast<uint8_t>(first);
    for (int tile : {2, 3, 5}) rows[tile] = static_cast<uint8_t>(second);
    for (int tile : {6, 7}) rows[tile] = 16;
  }
};

// The tiles' loads do not say what memory they read: what was written must be there before.
LDALIGN_INLINE void finish_writes() { asm volatile("" ::: "memory"); }

constexpr int64_t kTileRows = 16, kTileDepth = 32;  // depth: values along K
constexpr int64_t kTilePanel = kTileDepth * kPanel;  // values of a panel that one step reads

// Adds one step, 32 values along K, to the sums. Two: of up to 32 rows of x, else of up to 16.
template <bool Two>
LDALIGN_INLINE void add_tiles(const bf16* x, int64_t ldx, const bf16* panel) {
  _tile_loadd(6, panel, kPanel * 4);
  _tile_loadd(7, panel + kPanel, kPanel * 4);
  _tile_loadd(4, x, ldx * 2);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Two) {
    _tile_loadd(5, x + kTileRows * ldx, ldx * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Up to 32 rows of x against one panel; the tiles have their shapes.
template <class O, bool Two>
void amx_block(const bf16* x, int64_t ldx, int64_t rows, const bf16* panel, Ahead ahead, int64_t K, int64_t columns,
               O* y, int64_t ldy) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t k = 0;
  for (; k + kTileDepth <= K; k += kTileDepth, panel += kTilePanel) {
    for (int i = 0; i < kTileDepth / 2; ++i) ahead.fetch();
    add_tiles<Two>(x + k, ldx, panel);
  }
  if (k < K) {  // what is left, with zeros up to a whole step
    alignas(64) bf16 left[2 * kTileRows][kTileDepth] = {}, right[kTilePanel] = {};
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(left[r], x + r * ldx + k, (K - k) * sizeof(bf16));
    __builtin_memcpy(right, panel, (K - k) * kPanel * sizeof(bf16));
    finish_writes();
    add_tiles<Two>(left[0], kTileDepth, right);
  }
  alignas(64) float sums[2 * kTileRows][kPanel];
  _tile_stored(0, sums[0], sizeof sums[0]);
  _tile_stored(1, sums[0] + kPanel / 2, sizeof sums[0]);
  if constexpr (Two) {
    _tile_stored(2, sums[kTileRows], sizeof sums[0]);
    _tile_stored(3, sums[kTileRows] + kPanel / 2, sizeof sums[0]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t column = 0; column < kPanel; column += kLanes) {
      store_left(y + r * ldy + column, load(sums[r] + column, Whole{}), columns - column);
    }
  }
}

template <class O>
void amx_product(const bf16* x, int64_t ldx, int64_t rows, const bf16* packed, int64_t K, int64_t N, int64_t first,
                 int64_t last, O* y, int64_t ldy) {
  constexpr int64_t kRows = 2 * kTileRows;
  const TileShapes whole(kTileRows, kTileRows);
  const int64_t rest = rows % kRows, blocks = (rows + kRows - 1) / kRows;
  const TileShapes partial(rest < kTileRows ? rest : kTileRows, rest > kTileRows ? rest - kTileRows : kTileRows);
  finish_writes();
  for (int64_t panel = first; panel < last; ++panel) {
    const bf16* at = packed + panel * kPanel * K;
    const int64_t column = panel * kPanel;
    const auto ahead = [&](int64_t block) {  // each block calls its share of the next panel
      const char* following = reinterpret_cast<const char*>(at + kPanel * K);
      return Ahead{following + kPanel * K * 2 * block / blocks, kPanel * 4 / blocks};
    };
    if (rows >= kRows) _tile_loadconfig(&whole);
    for (int64_t block = 0; block < rows / kRows; ++block) {
      const int64_t row = block * kRows;
      amx_block<O, true>(x + row * ldx, ldx, kRows, at, ahead(block), K, N - column, y + row * ldy + column, ldy);
    }
    if (rest == 0) continue;
    const int64_t row = rows - rest;
    _tile_loadconfig(&partial);
    const auto block = rest > kTileRows ? amx_block<O, true> : amx_block<O, false>;
    block(x + row * ldx, ldx, rest, at, ahead(blocks - 1), K, N - column, y + row * ldy + column, ldy);
  }
  _tile_release();  // so that a switch of threads need not save them
}

}  // namespace ldalign::cpu::LDALIGN_ISA
