"""Where to edit: the location study, and the choice of a place without one."""
