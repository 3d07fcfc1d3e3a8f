-- What the site changes of every page on its way to HTML; notebooks stay as they are on GitHub and Colab.
if not FORMAT:match("html") then return {} end

local BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

-- The badge is a file of the site: no page asks another host for it.
local function badge(image)
  if image.src ~= BADGE then return nil end
  image.src = "/colab-badge.svg"
  return image
end

-- nbdev sets the first line of a docstring in italics; where the sentence goes on in the next line, all of its paragraph is.
local function docstrings(blocks)
  for i = 2, #blocks do
    local before, block = blocks[i - 1], blocks[i]
    if before.t == "CodeBlock" and block.t == "Para" and #block.content > 2
        and block.content[1].t == "Emph" and block.content[2].t == "SoftBreak" then
      local all = pandoc.List(block.content[1].content)
      for j = 2, #block.content do all:insert(block.content[j]) end
      blocks[i] = pandoc.Para({pandoc.Emph(all)})
    end
  end
  return blocks
end

return {{Image = badge, Blocks = docstrings}}
