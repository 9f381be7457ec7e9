"""What people ask of assistants and apps, in all directions: the middle that routes are told apart from.

A route known by a few lines needs something to be measured against. These lines were written for that. Their mean is
taken off every query's vector, and what lies no nearer to a route than they do is for nobody.
"""

LINES = tuple(
    """
what's the weather going to be like tomorrow
wake me up at half past six
turn off the lights in the kitchen
play some jazz from the sixties
book a table for four on Friday evening
is my flight on time
how long does it take to drive to the airport
add milk and eggs to the shopping list
remind me to call my sister tonight
what time is it in Tokyo
I want to cancel my subscription
my parcel has not arrived yet
where can I change my password
how do I get a refund for this order
the app keeps crashing when I open it
I was charged twice this month
can I speak to a human agent
what are your opening hours
do you ship to Canada
my screen is cracked, can it be repaired
I cannot log in to my account
how do I reset my router
which phone has the best camera
find me a hotel near the station
rent a car for the weekend
order a large pizza with mushrooms
call me a taxi
how many calories are in a banana
my head hurts and I feel dizzy
is it safe to take these two medicines together
how often should I water a cactus
my dog does not want to eat
who won the match last night
when is the next train to the city
tell me a joke
how are you today
what is your name
are you a robot
thank you, that is all
good morning
I feel lonely
who directed that film
what is the capital of Mongolia
when did the war end
how tall is the highest mountain
who wrote this novel
what does this word mean in Spanish
how do you say thank you in Japanese
translate this letter into German
summarise this report for my boss
write a poem about the sea
give me names for a cat
what should I cook with leftover rice
plan a weekend in Lisbon for two
how do I ask for a pay rise
explain how a vaccine works
why is the sea salty
compare electric and petrol cars
rewrite this sentence politely
is this review positive or negative
extract the names and dates from this text
what is the gist of this article
draft a contract for a freelance designer
can my landlord raise the rent without notice
what are my rights if I am dismissed
how is capital gain taxed
what is the interest rate on this loan
transfer fifty euros to my brother
my card was stolen
how do I apply for a visa
which vaccines do I need before I travel
how much does a passport cost
solve this equation for x
what is the square root of 144
how many litres are in a gallon
prove that this number is prime
what is the area of this circle
if three workers need two days, how long do five need
find the probability of two heads in a row
write a function that reverses a list
why does my program throw an exception
how do I install this package
fix the syntax error in this script
explain what this regular expression does
deploy this container to the cluster
how do I undo the last commit
list all users who signed up this week
how many orders were placed in March
show the average salary of each department
which product sold best last quarter
what is the email address of the supplier
draw a diagram of the water cycle
make the picture brighter
cut the first ten seconds of the video
read my last message aloud
what is on my calendar on Monday
move the meeting to three o'clock
share my location with Anna
how do I change a flat tyre
the engine makes a strange noise
what size of shoe am I in Europe
is this dress available in blue
recommend a book about Roman history
what are the symptoms of the flu
how do I sleep better
give me a workout for the back
what is the meaning of life
should I buy or rent a flat
how do I get rid of ants
describe the life cycle of a butterfly
which elements are in group two
what happens when acid meets metal
how do planes fly
who is responsible for this project
the patient is 54 and has a history of asthma
the party of the first part shall deliver the goods
please find attached the invoice for June
""".strip().splitlines()
)
