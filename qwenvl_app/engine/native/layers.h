// What the layers of both models are made of: products shared by a team.
#pragma once

#include "kernels.h"
#include "team.h"

constexpr int PANEL = 16 * TILE;  // rows of a part
constexpr long FEW = 8;          // rows of a part of what is no product

// Calls ``each(row)`` for so many rows.
template <class Each>
static void for_rows(Team& team, long rows, const Each& each) {
  team.share((rows + FEW - 1) / FEW, [&](long part) {
    for (long r = part * FEW; r < std::min(rows, (part + 1) * FEW); r++) each(r);
  });
}

// x (rows, inputs) times w, in blocks: ``write(row, first column, how many, sums)`` for each.
template <class Write>
static void multiply(Team& team, const float* x, long rows, long inputs, const float* w,
                     long columns, const Write& write) {
  const long blocks = (columns + BLOCK - 1) / BLOCK, panels = (rows + PANEL - 1) / PANEL;
  team.share(panels * blocks, [&](long part) {
    float sums[PANEL * BLOCK];
    const long first = part / blocks * PANEL, column = part % blocks * BLOCK;
    const long count = std::min<long>(PANEL, rows - first);
    product(x + first * inputs, inputs, count, inputs, w + column * inputs, BLOCK, BLOCK, sums,
            BLOCK);
    for (long r = 0; r < count; r++)
      write(first + r, column, std::min<long>(BLOCK, columns - column), sums + r * BLOCK);
  });
}
