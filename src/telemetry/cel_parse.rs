//! Expressions as they are written: the part of CEL that Istio's telemetry uses, by recursive descent.
//!
//! Bounded by construction: a text of at most [`MAX_TEXT`] bytes, nesting of at most [`MAX_DEPTH`].

use super::cel::{Binary, Expr, Function, Literal};

/// Longest expression, bytes.
const MAX_TEXT: usize = 2048;
/// Deepest nesting.
const MAX_DEPTH: usize = 32;

type Parsed = Result<Expr, String>;

/// Reads an expression; the error says what is wrong or not supported.
pub(super) fn parse(text: &str) -> Parsed {
    if text.len() > MAX_TEXT {
        return Err(format!("longer than {MAX_TEXT} bytes"));
    }
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens, at: 0, depth: 0 };
    let expr = parser.ternary()?;
    match parser.peek() {
        None => Ok(expr),
        Some(token) => Err(format!("{token:?} is not expected")),
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Literal(Literal),
    /// Operator or bracket.
    Sign(&'static str),
}

const SIGNS: [&str; 23] = [
    "&&", "||", "==", "!=", "<=", ">=", "?", ":", "(", ")", "[", "]", "{", "}", ".", ",", "<", ">", "+", "-", "*", "!",
    "%",
];

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut out = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let after;
        if first.is_ascii_alphabetic() || first == '_' {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
            out.push(name(&rest[..end]));
            after = &rest[end..];
        } else if first.is_ascii_digit() {
            let (number, left) = number(rest)?;
            out.push(Token::Literal(number));
            after = left;
        } else if first == '"' || first == '\'' {
            let (string, left) = string(rest, first)?;
            out.push(Token::Literal(Literal::Text(string)));
            after = left;
        } else if first == '/' {
            return Err("division is not supported".to_owned());
        } else {
            let sign = SIGNS.into_iter().find(|sign| rest.starts_with(sign));
            let sign = sign.ok_or_else(|| format!("{first:?} is not expected"))?;
            out.push(Token::Sign(sign));
            after = &rest[sign.len()..];
        }
        rest = after.trim_start();
    }
    Ok(out)
}

fn name(word: &str) -> Token {
    match word {
        "true" => Token::Literal(Literal::Bool(true)),
        "false" => Token::Literal(Literal::Bool(false)),
        "null" => Token::Literal(Literal::Null),
        _ => Token::Name(word.to_owned()),
    }
}

fn number(text: &str) -> Result<(Literal, &str), String> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let literal = match digits.contains('.') {
        true => digits.parse().map(Literal::Double).ok(),
        false => digits.parse().map(Literal::Int).ok(),
    };
    let literal = literal.ok_or_else(|| format!("{digits} is no number"))?;
    Ok((literal, rest.strip_prefix(['u', 'U']).unwrap_or(rest)))
}

fn string(text: &str, quote: char) -> Result<(String, &str), String> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return Ok((out, &text[at + 1..]));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next().map(|(_, escaped)| escaped) {
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('r') => out.push('\r'),
            Some(plain @ ('\\' | '"' | '\'' | '`' | '?')) => out.push(plain),
            other => return Err(format!("escape {other:?} in a string is not supported")),
        }
    }
    Err("a string does not end".to_owned())
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Sign(next)) if *next == sign);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &str) -> Result<(), String> {
        if self.take(sign) { Ok(()) } else { Err(format!("{sign:?} is expected, not {:?}", self.peek())) }
    }

    fn ternary(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH}"));
        }
        let condition = self.chain(&["||"], |p| p.chain(&["&&"], Self::relation))?;
        let out = if self.take("?") {
            let yes = self.ternary()?;
            self.expect(":")?;
            Expr::If(Box::new([condition, yes, self.ternary()?]))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(out)
    }

    /// Operands of operators of one rank, from left to right.
    fn chain(&mut self, signs: &[&str], operand: impl Fn(&mut Self) -> Parsed) -> Parsed {
        let mut left = operand(self)?;
        while let Some(sign) = signs.iter().find(|sign| self.take(sign)) {
            let right = operand(self)?;
            left = Expr::Binary(Binary::of(sign), Box::new([left, right]));
        }
        Ok(left)
    }

    fn relation(&mut self) -> Parsed {
        let left = self.chain(&["+", "-"], |p| p.chain(&["*", "%"], Self::unary))?;
        if matches!(self.peek(), Some(Token::Name(name)) if name == "in") {
            self.at += 1;
            let right = self.chain(&["+", "-"], Self::unary)?;
            return Ok(Expr::Binary(Binary::In, Box::new([left, right])));
        }
        let signs = ["==", "!=", "<=", ">=", "<", ">"];
        let Some(sign) = signs.iter().find(|sign| self.take(sign)) else { return Ok(left) };
        let right = self.chain(&["+", "-"], |p| p.chain(&["*", "%"], Self::unary))?;
        Ok(Expr::Binary(Binary::of(sign), Box::new([left, right])))
    }

    fn unary(&mut self) -> Parsed {
        let mut signs = Vec::new();
        loop {
            match ["!", "-"].into_iter().find(|sign| self.take(sign)) {
                Some(_) if signs.len() == MAX_DEPTH => return Err(format!("nested deeper than {MAX_DEPTH}")),
                Some(sign) => signs.push(sign),
                None => break,
            }
        }
        let inner = self.member()?;
        Ok(signs.into_iter().rev().fold(inner, |inner, sign| match sign {
            "!" => Expr::Not(Box::new(inner)),
            _ => Expr::Negative(Box::new(inner)),
        }))
    }

    fn member(&mut self) -> Parsed {
        let mut out = self.primary()?;
        loop {
            if self.take(".") {
                let Some(Token::Name(name)) = self.peek().cloned() else {
                    return Err(format!("a name is expected behind \".\", not {:?}", self.peek()));
                };
                self.at += 1;
                out = if self.take("(") { self.call(&name, Some(out))? } else { out.select(name) };
            } else if self.take("[") {
                let index = self.ternary()?;
                self.expect("]")?;
                out = match index {
                    Expr::Literal(Literal::Text(key)) => out.select(key),
                    index => Expr::Index(Box::new([out, index])),
                };
            } else {
                return Ok(out);
            }
        }
    }

    fn primary(&mut self) -> Parsed {
        if self.take("(") {
            let inner = self.ternary()?;
            self.expect(")")?;
            return Ok(inner);
        }
        if self.take("[") {
            return Ok(Expr::List(self.list("]")?.into()));
        }
        match self.peek().cloned() {
            Some(Token::Literal(literal)) => {
                self.at += 1;
                Ok(Expr::Literal(literal))
            }
            Some(Token::Name(name)) => {
                self.at += 1;
                if self.take("(") { self.call(&name, None) } else { Ok(Expr::Attribute(Box::new([name.into()]))) }
            }
            Some(token) => Err(format!("{token:?} is not expected")),
            None => Err("it ends too early".to_owned()),
        }
    }

    fn list(&mut self, end: &str) -> Result<Vec<Expr>, String> {
        let mut out = Vec::new();
        while !self.take(end) {
            out.push(self.ternary()?);
            if !self.take(",") {
                self.expect(end)?;
                break;
            }
        }
        Ok(out)
    }

    fn call(&mut self, name: &str, target: Option<Expr>) -> Parsed {
        let is_method = target.is_some();
        let mut arguments: Vec<Expr> = target.into_iter().collect();
        arguments.extend(self.list(")")?);
        let function = Function::named(name, is_method).ok_or_else(|| format!("function {name} is not supported"))?;
        if arguments.len() != function.arity() {
            return Err(format!("{name} takes {} arguments, not {}", function.arity(), arguments.len()));
        }
        function.apply(arguments)
    }
}
