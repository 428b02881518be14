"""The commands, a module a subject. Each names its options and calls one function; it imports what
it needs when it runs, knows no other command and computes nothing itself."""
