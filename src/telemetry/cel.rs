//! Expressions over a record: what dimensions of metrics and filters of access logs say (a part of CEL).
//!
//! An expression is parsed when configuration is compiled and evaluated over borrowed facts, without a context being
//! built. What cannot be evaluated (a header that is not there, a comparison of different types) is [`Undefined`], which
//! `&&` and `||` absorb as CEL says.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt::Write as _;
use std::sync::Arc;

use http::HeaderName;
use regex::Regex;

use super::attributes::{self, Facts};
use super::cel_parse;

/// A compiled expression. Equal when its text is.
#[derive(Debug, Clone)]
pub struct Expression {
    text: Arc<str>,
    expr: Arc<Expr>,
}

/// There is no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Undefined;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub enum CelValue<'a> {
    /// Nothing.
    Null,
    /// Yes or no.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A fraction.
    Double(f64),
    /// Text.
    Text(Cow<'a, str>),
    /// Several.
    List(Vec<Self>),
    /// Something with parts, as JSON.
    Json(&'a serde_json::Value),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Literal {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(String),
}

#[derive(Debug)]
pub(super) enum Expr {
    Literal(Literal),
    /// `a.b['c']`, parts in order.
    Attribute(Box<[Box<str>]>),
    Select(Box<Self>, Box<str>),
    Index(Box<[Self; 2]>),
    List(Box<[Self]>),
    Not(Box<Self>),
    Negative(Box<Self>),
    Binary(Binary, Box<[Self; 2]>),
    If(Box<[Self; 3]>),
    Has(Box<Self>),
    Matches(Box<Self>, Regex),
    Call(Function, Box<[Self]>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    And,
    Or,
    Eq,
    Ne,
    Le,
    Ge,
    Lt,
    Gt,
    Add,
    Sub,
    Mul,
    Rem,
    In,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Has,
    Text,
    Int,
    Double,
    Bool,
    Size,
    StartsWith,
    EndsWith,
    Contains,
    Matches,
    LowerAscii,
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Expression {}

impl Expression {
    /// Compiles.
    ///
    /// # Errors
    /// What is wrong with the text, or which function we do not know.
    pub fn compile(text: &str) -> Result<Self, String> {
        Ok(Self { text: text.into(), expr: Arc::new(cel_parse::parse(text)?) })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its value.
    ///
    /// # Errors
    /// There is none.
    pub fn value<'a>(&'a self, facts: &Facts<'a>) -> Result<CelValue<'a>, Undefined> {
        self.expr.value(facts)
    }

    /// Whether it is true.
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        self.value(facts) == Ok(CelValue::Bool(true))
    }

    /// Request and response headers that it reads.
    pub fn headers(&self) -> (Vec<HeaderName>, Vec<HeaderName>) {
        let mut out = (Vec::new(), Vec::new());
        self.expr.headers(&mut out);
        out
    }
}

impl CelValue<'_> {
    /// As a label or a log shows it.
    pub fn print(&self, out: &mut String) {
        // Writing to a string cannot fail.
        let _ = match self {
            Self::Null => out.write_str("null"),
            Self::Bool(flag) => write!(out, "{flag}"),
            Self::Int(number) => write!(out, "{number}"),
            Self::Double(number) => write!(out, "{number}"),
            Self::Text(text) => out.write_str(text),
            Self::Json(value) => write!(out, "{value}"),
            Self::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    item.print(out);
                }
                out.write_char(']')
            }
        };
    }
}

impl<'a> From<&'a serde_json::Value> for CelValue<'a> {
    fn from(value: &'a serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Null,
            serde_json::Value::Bool(flag) => Self::Bool(*flag),
            serde_json::Value::String(text) => Self::Text(text.into()),
            serde_json::Value::Number(number) => {
                number.as_i64().map_or_else(|| Self::Double(number.as_f64().unwrap_or(f64::NAN)), Self::Int)
            }
            serde_json::Value::Array(items) => Self::List(items.iter().map(Into::into).collect()),
            serde_json::Value::Object(_) => Self::Json(value),
        }
    }
}

type Outcome<'a> = Result<CelValue<'a>, Undefined>;

impl Expr {
    /// `self.name`.
    pub(super) fn select(self, name: String) -> Self {
        match self {
            Self::Attribute(path) => {
                let mut path = path.into_vec();
                path.push(name.into());
                Self::Attribute(path.into())
            }
            other => Self::Select(Box::new(other), name.into()),
        }
    }

    fn value<'a>(&'a self, facts: &Facts<'a>) -> Outcome<'a> {
        match self {
            Self::Literal(literal) => Ok(literal.value()),
            Self::Attribute(path) => attributes::value(path, facts).ok_or(Undefined),
            Self::Select(of, name) => match of.value(facts)? {
                CelValue::Json(value) => value.get(&**name).map(Into::into).ok_or(Undefined),
                _ => Err(Undefined),
            },
            Self::Index(both) => index(both[0].value(facts)?, &both[1].value(facts)?),
            Self::List(items) => {
                items.iter().map(|item| item.value(facts)).collect::<Result<_, _>>().map(CelValue::List)
            }
            Self::Not(inner) => inner.flag(facts).map(|flag| CelValue::Bool(!flag)),
            Self::Negative(inner) => match inner.value(facts)? {
                CelValue::Int(number) => number.checked_neg().map(CelValue::Int).ok_or(Undefined),
                CelValue::Double(number) => Ok(CelValue::Double(-number)),
                _ => Err(Undefined),
            },
            Self::Binary(Binary::And, both) => logic(both, facts, false),
            Self::Binary(Binary::Or, both) => logic(both, facts, true),
            Self::Binary(Binary::In, both) => contained(both, facts),
            Self::Binary(how, both) => binary(*how, both[0].value(facts)?, both[1].value(facts)?),
            Self::If(three) => {
                let chosen = if three[0].flag(facts)? { &three[1] } else { &three[2] };
                chosen.value(facts)
            }
            Self::Has(inner) => Ok(CelValue::Bool(inner.value(facts).is_ok())),
            Self::Matches(of, regex) => match of.value(facts)? {
                CelValue::Text(text) => Ok(CelValue::Bool(regex.is_match(&text))),
                _ => Err(Undefined),
            },
            Self::Call(function, arguments) => {
                let arguments: Result<Vec<_>, _> = arguments.iter().map(|argument| argument.value(facts)).collect();
                function.value(arguments?)
            }
        }
    }

    fn flag(&self, facts: &Facts<'_>) -> Result<bool, Undefined> {
        match self.value(facts)? {
            CelValue::Bool(flag) => Ok(flag),
            _ => Err(Undefined),
        }
    }

    fn headers(&self, out: &mut (Vec<HeaderName>, Vec<HeaderName>)) {
        match self {
            Self::Literal(_) => {}
            Self::Attribute(path) => attributes::headers(path, out),
            Self::Select(inner, _)
            | Self::Not(inner)
            | Self::Negative(inner)
            | Self::Has(inner)
            | Self::Matches(inner, _) => {
                inner.headers(out);
            }
            Self::Binary(Binary::In, both) => {
                both.iter().for_each(|part| part.headers(out));
                if let (Self::Literal(Literal::Text(name)), Self::Attribute(path)) = (&both[0], &both[1]) {
                    let path: Vec<Box<str>> = path.iter().cloned().chain([name.as_str().into()]).collect();
                    attributes::headers(&path, out);
                }
            }
            Self::Index(both) | Self::Binary(_, both) => both.iter().for_each(|part| part.headers(out)),
            Self::If(three) => three.iter().for_each(|part| part.headers(out)),
            Self::List(parts) | Self::Call(_, parts) => parts.iter().for_each(|part| part.headers(out)),
        }
    }
}

impl Literal {
    fn value(&self) -> CelValue<'_> {
        match self {
            Self::Null => CelValue::Null,
            Self::Bool(flag) => CelValue::Bool(*flag),
            Self::Int(number) => CelValue::Int(*number),
            Self::Double(number) => CelValue::Double(*number),
            Self::Text(text) => CelValue::Text(text.as_str().into()),
        }
    }
}

/// `&&` and `||`: one side that decides is enough, whatever the other is.
fn logic<'a>(both: &[Expr; 2], facts: &Facts<'_>, decides: bool) -> Outcome<'a> {
    let left = both[0].flag(facts);
    if left == Ok(decides) {
        return Ok(CelValue::Bool(decides));
    }
    let right = both[1].flag(facts);
    if right == Ok(decides) {
        return Ok(CelValue::Bool(decides));
    }
    left.and(right).map(CelValue::Bool)
}

/// `key in map` and `item in list`.
fn contained<'a>(both: &'a [Expr; 2], facts: &Facts<'a>) -> Outcome<'a> {
    let wanted = both[0].value(facts)?;
    if let (CelValue::Text(key), Expr::Attribute(path)) = (&wanted, &both[1]) {
        let path: Vec<Box<str>> = path.iter().cloned().chain([key.as_ref().into()]).collect();
        if attributes::value(&path, facts).is_some() {
            return Ok(CelValue::Bool(true));
        }
        if attributes::is_map(&both[1]) {
            return Ok(CelValue::Bool(false));
        }
    }
    match both[1].value(facts)? {
        CelValue::List(items) => Ok(CelValue::Bool(items.contains(&wanted))),
        CelValue::Json(serde_json::Value::Object(map)) => match &wanted {
            CelValue::Text(key) => Ok(CelValue::Bool(map.contains_key(key.as_ref()))),
            _ => Err(Undefined),
        },
        _ => Err(Undefined),
    }
}

fn index<'a>(of: CelValue<'a>, at: &CelValue<'_>) -> Outcome<'a> {
    match (of, at) {
        (CelValue::List(mut items), CelValue::Int(at)) => {
            let at = usize::try_from(*at).ok().filter(|at| *at < items.len()).ok_or(Undefined)?;
            Ok(items.swap_remove(at))
        }
        (CelValue::Json(value), CelValue::Text(key)) => value.get(key.as_ref()).map(Into::into).ok_or(Undefined),
        _ => Err(Undefined),
    }
}

fn binary<'a>(how: Binary, left: CelValue<'a>, right: CelValue<'a>) -> Outcome<'a> {
    use CelValue::{Double, Int, Text};
    let ordered = |wanted: fn(Ordering) -> bool| {
        let order = match (&left, &right) {
            (Int(a), Int(b)) => a.cmp(b),
            (Text(a), Text(b)) => a.cmp(b),
            (Double(a), Double(b)) => a.partial_cmp(b).ok_or(Undefined)?,
            (Int(a), Double(b)) => (*a as f64).partial_cmp(b).ok_or(Undefined)?,
            (Double(a), Int(b)) => a.partial_cmp(&(*b as f64)).ok_or(Undefined)?,
            _ => return Err(Undefined),
        };
        Ok(CelValue::Bool(wanted(order)))
    };
    match how {
        Binary::Eq => same(&left, &right).map(CelValue::Bool),
        Binary::Ne => same(&left, &right).map(|same| CelValue::Bool(!same)),
        Binary::Le => ordered(Ordering::is_le),
        Binary::Ge => ordered(Ordering::is_ge),
        Binary::Lt => ordered(Ordering::is_lt),
        Binary::Gt => ordered(Ordering::is_gt),
        Binary::Add => match (left, right) {
            (Text(a), Text(b)) => Ok(Text(Cow::Owned(a.into_owned() + &b))),
            (a, b) => arithmetic(&a, &b, i64::checked_add, |a, b| a + b),
        },
        Binary::Sub => arithmetic(&left, &right, i64::checked_sub, |a, b| a - b),
        Binary::Mul => arithmetic(&left, &right, i64::checked_mul, |a, b| a * b),
        Binary::Rem => arithmetic(&left, &right, i64::checked_rem, |_, _| f64::NAN),
        Binary::And | Binary::Or | Binary::In => Err(Undefined),
    }
}

/// Values of different kinds are not comparable; numbers are, and everything is with null.
fn same(left: &CelValue<'_>, right: &CelValue<'_>) -> Result<bool, Undefined> {
    match (left, right) {
        (CelValue::Int(a), CelValue::Double(b)) | (CelValue::Double(b), CelValue::Int(a)) => Ok(*a as f64 == *b),
        (CelValue::Null, _) | (_, CelValue::Null) => Ok(left == right),
        _ if std::mem::discriminant(left) == std::mem::discriminant(right) => Ok(left == right),
        _ => Err(Undefined),
    }
}

fn arithmetic<'a>(
    left: &CelValue<'_>,
    right: &CelValue<'_>,
    whole: fn(i64, i64) -> Option<i64>,
    fraction: fn(f64, f64) -> f64,
) -> Outcome<'a> {
    match (left, right) {
        (CelValue::Int(a), CelValue::Int(b)) => whole(*a, *b).map(CelValue::Int).ok_or(Undefined),
        (CelValue::Double(a), CelValue::Double(b)) => Ok(CelValue::Double(fraction(*a, *b))),
        _ => Err(Undefined),
    }
}

impl Binary {
    pub(super) fn of(sign: &str) -> Self {
        match sign {
            "&&" => Self::And,
            "||" => Self::Or,
            "==" => Self::Eq,
            "!=" => Self::Ne,
            "<=" => Self::Le,
            ">=" => Self::Ge,
            "<" => Self::Lt,
            ">" => Self::Gt,
            "+" => Self::Add,
            "-" => Self::Sub,
            "*" => Self::Mul,
            _ => Self::Rem,
        }
    }
}

impl Function {
    pub(super) fn named(name: &str, is_method: bool) -> Option<Self> {
        Some(match (name, is_method) {
            ("has", false) => Self::Has,
            ("string", false) => Self::Text,
            ("int" | "uint", false) => Self::Int,
            ("double", false) => Self::Double,
            ("bool", false) => Self::Bool,
            ("size", _) => Self::Size,
            ("startsWith", true) => Self::StartsWith,
            ("endsWith", true) => Self::EndsWith,
            ("contains", true) => Self::Contains,
            ("matches", _) => Self::Matches,
            ("lowerAscii", true) => Self::LowerAscii,
            _ => return None,
        })
    }

    pub(super) fn arity(self) -> usize {
        match self {
            Self::StartsWith | Self::EndsWith | Self::Contains | Self::Matches => 2,
            _ => 1,
        }
    }

    /// The call; a pattern is compiled now.
    pub(super) fn apply(self, mut arguments: Vec<Expr>) -> Result<Expr, String> {
        match (self, arguments.as_slice()) {
            (Self::Has, [Expr::Attribute(_) | Expr::Select(..)]) => {
                Ok(Expr::Has(Box::new(arguments.pop().expect("one argument"))))
            }
            (Self::Has, _) => Err("has() takes a field".to_owned()),
            (Self::Matches, [_, Expr::Literal(Literal::Text(pattern))]) => {
                let regex = Regex::new(pattern).map_err(|e| format!("pattern {pattern:?}: {e}"))?;
                Ok(Expr::Matches(Box::new(arguments.swap_remove(0)), regex))
            }
            (Self::Matches, _) => Err("matches() takes a literal pattern".to_owned()),
            _ => Ok(Expr::Call(self, arguments.into())),
        }
    }

    fn value(self, arguments: Vec<CelValue<'_>>) -> Outcome<'_> {
        let text = |flag: fn(&str, &str) -> bool| match &arguments[..] {
            [CelValue::Text(of), CelValue::Text(part)] => Ok(CelValue::Bool(flag(of, part))),
            _ => Err(Undefined),
        };
        match (self, &arguments[0]) {
            (Self::StartsWith, _) => text(|of, part| of.starts_with(part)),
            (Self::EndsWith, _) => text(|of, part| of.ends_with(part)),
            (Self::Contains, _) => text(|of, part| of.contains(part)),
            (Self::LowerAscii, CelValue::Text(of)) => Ok(CelValue::Text(of.to_ascii_lowercase().into())),
            (Self::Size, CelValue::Text(of)) => Ok(CelValue::Int(of.chars().count() as i64)),
            (Self::Size, CelValue::List(of)) => Ok(CelValue::Int(of.len() as i64)),
            (Self::Text, CelValue::List(_) | CelValue::Json(_) | CelValue::Null) => Err(Undefined),
            (Self::Text, value) => {
                let mut out = String::new();
                value.print(&mut out);
                Ok(CelValue::Text(out.into()))
            }
            (Self::Int, CelValue::Int(number)) => Ok(CelValue::Int(*number)),
            (Self::Int, CelValue::Double(number)) => Ok(CelValue::Int(*number as i64)),
            (Self::Int, CelValue::Text(of)) => of.parse().map(CelValue::Int).map_err(|_| Undefined),
            (Self::Double, CelValue::Int(number)) => Ok(CelValue::Double(*number as f64)),
            (Self::Double, CelValue::Double(number)) => Ok(CelValue::Double(*number)),
            (Self::Double, CelValue::Text(of)) => of.parse().map(CelValue::Double).map_err(|_| Undefined),
            (Self::Bool, CelValue::Bool(flag)) => Ok(CelValue::Bool(*flag)),
            (Self::Bool, CelValue::Text(of)) => of.parse().map(CelValue::Bool).map_err(|_| Undefined),
            _ => Err(Undefined),
        }
    }
}

#[cfg(test)]
#[path = "cel_tests.rs"]
mod tests;
