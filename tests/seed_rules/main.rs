//! The guide's YAML (`proxy-config/examples/seed`), rule by rule: what it decides, asked of the pure functions that the
//! data path itself uses, and of one worker's upstream side over loopback where time and counts decide.
//!
//! Rows bear the numbers (`T15`, ...) under which the behaviours are listed; `Y1` to `Y15` are the guide's resources in
//! the order in which it shows them. What needs processes and namespaces is in `mesh.rs`.

mod limits;
mod policies;
mod probes;
mod routes;
mod world;
