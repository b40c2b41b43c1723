// Qwen's models in float32 on a CPU, without an interpreter: see __init__.py.
//
// A pass through layers is one call. Weights lie as they are read: in blocks of BLOCK columns,
// (columns / BLOCK, inputs, BLOCK).

#include "text.h"
#include "tower.h"

extern "C" {

int block() { return BLOCK; }

void* new_team(int threads) { return new Team(threads); }

void delete_team(void* team) { delete static_cast<Team*>(team); }

void* new_text(void* team, const TextModel* model) {
  return new Text(*static_cast<Team*>(team), *model);
}

void forward(void* text, const TextCall* call) { static_cast<Text*>(text)->forward(*call); }

void delete_text(void* text) { delete static_cast<Text*>(text); }

void* new_tower(void* team, const TowerModel* model) {
  return new Tower(*static_cast<Team*>(team), *model);
}

void embed(void* tower, const EmbedCall* call) { static_cast<Tower*>(tower)->embed(*call); }

void layer(void* tower, const TowerCall* call) { static_cast<Tower*>(tower)->layer(*call); }

void merge(void* tower, const MergerCall* call) { static_cast<Tower*>(tower)->merge(*call); }

void delete_tower(void* tower) { delete static_cast<Tower*>(tower); }
}
