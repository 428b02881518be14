"""The commands, a module a subject: each names its options and calls one function. No command knows another, and none
computes anything itself; what a command needs is imported when it runs."""
