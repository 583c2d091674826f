//! Every failure, and what it means outside: one enum, one table.
