//! A JSON reader, as much of one as config.json and the header of safetensors need.

use crate::Result;

/// A JSON value. Objects keep the order of the text.
#[derive(Debug)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Parse a whole text.
    pub fn parse(text: &str) -> Result<Json> {
        let mut reader = Reader { text, at: 0 };
        let value = reader.value()?;
        match reader.peek() {
            0 => Ok(value),
            _ => Err(reader.error("the end")),
        }
    }

    /// The value of a key of an object; None if it is missing or null, which config.json means alike.
    pub fn get(&self, key: &str) -> Option<&Json> {
        let (_, value) = self.entries().iter().find(|(name, _)| name == key)?;
        match value {
            Json::Null => None,
            value => Some(value),
        }
    }

    /// Keys and values of an object, and nothing for anything else.
    pub fn entries(&self) -> &[(String, Json)] {
        match self {
            Json::Object(entries) => entries,
            _ => &[],
        }
    }

    pub fn items(&self) -> &[Json] {
        match self {
            Json::List(items) => items,
            _ => &[],
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self {
            Json::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn is_true(&self) -> bool {
        matches!(self, Json::Bool(true))
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    /// The next byte that is no white space, without taking it; 0 at the end of the text.
    fn peek(&mut self) -> u8 {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text.as_bytes().get(self.at).copied().unwrap_or(0)
    }

    fn value(&mut self) -> Result<Json> {
        match self.peek() {
            b'{' => Ok(Json::Object(self.sequence(b'}', Self::entry)?)),
            b'[' => Ok(Json::List(self.sequence(b']', Self::value)?)),
            b'"' => Ok(Json::Text(self.string()?)),
            _ => self.word(),
        }
    }

    /// `null`, `true`, `false` or a number: all that ends where a separator begins.
    fn word(&mut self) -> Result<Json> {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| c.is_whitespace() || ",]}".contains(c)).unwrap_or(rest.len());
        let value = match &rest[..end] {
            "null" => Json::Null,
            "true" => Json::Bool(true),
            "false" => Json::Bool(false),
            word => Json::Number(word.parse().map_err(|_| self.error("a value"))?),
        };
        self.at += end;
        Ok(value)
    }

    /// What stands between the bracket here and `close`, separated by commas.
    fn sequence<T>(&mut self, close: u8, item: fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        self.at += 1;
        let mut items = Vec::new();
        while self.peek() != close {
            if !items.is_empty() {
                self.expect(b',')?;
            }
            items.push(item(self)?);
        }
        self.at += 1;
        Ok(items)
    }

    fn entry(&mut self) -> Result<(String, Json)> {
        let key = self.string()?;
        self.expect(b':')?;
        Ok((key, self.value()?))
    }

    fn string(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let mut out = String::new();
        loop {
            let next = self.text[self.at..].chars().next().ok_or_else(|| self.error("a closing quote"))?;
            self.at += next.len_utf8();
            match next {
                '"' => return Ok(out),
                '\\' => out.push(self.escaped()?),
                plain => out.push(plain),
            }
        }
    }

    /// The character that a backslash begins. A surrogate pair becomes two replacement characters.
    fn escaped(&mut self) -> Result<char> {
        let kind = self.text[self.at..].chars().next().ok_or_else(|| self.error("an escape"))?;
        self.at += kind.len_utf8();
        Ok(match kind {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'u' => {
                let digits = self.text.get(self.at..self.at + 4).ok_or_else(|| self.error("four digits"))?;
                self.at += 4;
                let code = u32::from_str_radix(digits, 16).map_err(|_| self.error("four hexadecimal digits"))?;
                char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            same => same,
        })
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        if self.peek() != byte {
            return Err(self.error(&format!("{:?}", byte as char)));
        }
        self.at += 1;
        Ok(())
    }

    fn error(&self, wanted: &str) -> Box<dyn std::error::Error> {
        format!("JSON: expected {wanted} at byte {}", self.at).into()
    }
}
