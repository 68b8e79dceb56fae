// The bodies in use on this machine.
#pragma once

#include "attend.h"
#include "low_rank.h"

namespace knowedit {

const AttendBodies& attend_bodies();
const LowRankBodies& low_rank_bodies();

}  // namespace knowedit
