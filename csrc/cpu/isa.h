// The bodies in use on this machine.
#pragma once

#include "attend.h"

namespace knowedit {

const AttendBodies& attend_bodies();

}  // namespace knowedit
